"""A directory belongs to one run at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK = ".lock"  # the file that is locked; it says by whom


@contextmanager
def hold(out: str | Path, mine: bool = True) -> Iterator[Path]:
    """Make the directory ``out`` and keep every other run out of it for the length of the with block.

    Of the processes of one run one holds it; the others, with ``mine`` False, only check its name.

    The lock is the kernel's (``flock``), so it ends with the process, however that ends; a file that a killed process left is
    taken over. Raises ValueError if ``out`` cannot be a directory or a run, of this process or another, is using it.
    """
    if not isinstance(out, str | os.PathLike) or not str(out):
        raise ValueError(f"out: got {out!r}, supported: the path of a directory")
    directory = Path(out)
    if not mine:
        yield directory
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"out: got {out}, which is a file or lies below one, supported: the path of a directory") from None
    path = directory / LOCK
    descriptor = _locked(path)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield directory
    finally:
        with suppress(OSError):
            path.unlink()  # before the lock is released: whoever locks this file later sees that it is gone
        os.close(descriptor)


def _locked(path: Path) -> int:
    """A descriptor of the file at ``path``, which it locks."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_nlink:
                return descriptor
            os.close(descriptor)  # its owner has just removed it
        except OSError as error:
            owner = os.read(descriptor, 200).decode(errors="replace") or "another process"
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(descriptor)
                raise ValueError(f"out: {path.parent} is in use by {owner}, supported: a directory that no other run uses") from None
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                warnings.warn(f"out: the file system of {path.parent} has no locks; do not start a second run there", stacklevel=4)
                return descriptor
            os.close(descriptor)
            raise
