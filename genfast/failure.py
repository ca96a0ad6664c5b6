"""How a command ends: with one sentence on stderr for whatever went wrong, and the status that says what kind of thing it was."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import NoReturn

# What a user can mend: a wrong argument or file, a full disk, a missing device or package, too little memory, a training that diverges.
MENDABLE = (ValueError, RuntimeError, OSError, ArithmeticError, ImportError, MemoryError)


def guarded(command: Callable[[], object], interrupted: str = "interrupted") -> int:
    """Call ``command`` and return the process's exit status: 0, 2 for a failure that a user can mend, 1 for a fault in genfast.

    130 stands for Ctrl-C and 143 for SIGTERM, answered by what the exception says or the sentence ``interrupted``, and 141 for a reader
    of the output that has gone. Each but the last is one line on stderr, and with GENFAST_DEBUG=1 in the environment the traceback
    comes before it.
    """
    plain, warnings.formatwarning = warnings.formatwarning, lambda message, *_: f"genfast: warning: {_line(str(message))}\n"
    try:
        command()
        sys.stdout.flush()
    except KeyboardInterrupt as error:
        return _end(str(error) or interrupted, getattr(error, "status", 130))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer goes nowhere
        return 141
    except MENDABLE as error:
        return _end(sentence(error), 2)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{os.path.basename(frame.filename)}, line {frame.lineno}"
        return _end(f"{type(error).__name__} in {where}: {sentence(error)}; this is a fault in genfast, GENFAST_DEBUG=1 shows more", 1)
    finally:
        warnings.formatwarning = plain
    return 0


class Parser(argparse.ArgumentParser):
    """A parser that answers a wrong command line with one line, as `guarded` answers everything else."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"genfast: {message}; {self.prog} --help says what there is\n")


def sentence(error: BaseException) -> str:
    """What an exception says, on one line: of the operating system's errors the file and the reason."""
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror[0].lower() + error.strerror[1:]
        return f"{error.filename}: {reason}" if error.filename is not None else reason
    if isinstance(error, MemoryError):
        return f"there is not enough memory ({_line(str(error))})" if str(error) else "there is not enough memory"
    return _line(str(error)) or type(error).__name__


def _end(text: str, status: int) -> int:
    if os.environ.get("GENFAST_DEBUG") == "1":
        traceback.print_exc()
    print(f"genfast: {text}", file=sys.stderr)
    return status


def _line(text: str) -> str:
    joined = " ".join(text.split())
    return joined if len(joined) <= 600 else joined[:597] + "..."
