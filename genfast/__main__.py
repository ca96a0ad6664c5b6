"""``python -m genfast`` is the ``genfast`` command, for launchers such as torchrun that start modules."""

from genfast.cli import main

if __name__ == "__main__":
    main()
