"""How a command ends: with one sentence on stderr for whatever went wrong, and the status that says what kind of thing it was."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn

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


def parse(kind: Callable[..., Any], words: Sequence[str], prog: str) -> Any:
    """Call ``kind`` with what a command line says of its parameters, by tyro. What is wrong with it is a ValueError of one sentence."""
    import tyro

    width, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), "100" if {"-h", "--help"} & {*words} else "2000"  # no sentence is wrapped
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, prog=prog, args=[*words], config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff))
    except SystemExit as exit:
        if exit.code:
            raise ValueError(f"{_unboxed(said.getvalue())}; {prog} --help says what there is") from None
        raise
    finally:
        os.environ.pop("COLUMNS") if width is None else os.environ.update(COLUMNS=width)


def dispatch(commands: Mapping[str, Callable[..., Any]], words: Sequence[str], as_they_are: Collection[Callable[..., Any]]) -> None:
    """Call the command that ``words`` begin with, with the rest: ``as_they_are`` take a list of words, the others options by `parse`."""
    from genfast import __version__
    from genfast.checks import nearest

    if words == ["--version"]:
        print(f"genfast {__version__}")
        return
    name = next((name for name in commands if name.split() == [*words[: len(name.split())]]), None)
    if name is not None:
        command, rest = commands[name], words[len(name.split()) :]
        command(rest) if command in as_they_are else parse(command, rest, f"genfast {name}")
        return
    begun = [word for word in words if not word.startswith("-")]
    offered = {name: command for name, command in commands.items() if name.split()[: len(begun)] == begun}
    if not offered or not {"-h", "--help"} & {*words}:
        got = f"got {' '.join(words)!r}" if words else "got none"
        names = ", ".join(offered or commands)
        raise ValueError(
            f"COMMAND: {got}, supported: {names}{nearest(' '.join(begun), commands) if begun else ''}; genfast --help says more"
        )
    print("usage: genfast COMMAND [options]\n\nFast generative models in PyTorch. genfast COMMAND --help says more of each.\n")
    for name, command in offered.items():
        print(f"  {name:12}{(command.__doc__ or '').splitlines()[0]}")
    print("  --version   print the version and end" if not begun else "", end="\n" if not begun else "")


def _unboxed(text: str) -> str:
    """The message in tyro's box, without the lines around it, its repetition of the help and its pointers to more."""
    parts: list[list[str]] = [[]]
    for line in (line.strip("│ ") for line in text.splitlines() if line.strip() and line[0] not in "╭╰"):
        parts.append([]) if {*line} <= {*"─-"} else parts[-1].append(line)
    if "╭" not in text:  # in other encodings the title is a line of its own
        parts = parts[1:]
    message = " ".join(parts[0]).removeprefix("Error parsing ") if parts else _line(text)
    message = re.sub(r"^\w+: (?=\w+: got)", "", message)  # the dataclass, before a refusal of its own
    meant = [part[1].split()[0] for part in parts[1:] if len(part) > 1 and part[0].startswith("Perhaps you meant")]
    return f"{message}; did you mean {meant[0]}?" if meant else message


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
