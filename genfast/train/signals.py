"""How a signal ends a run in good order."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stopped(KeyboardInterrupt):
    """A signal ended a run in good order: everything is saved. ``status`` is the process's exit status."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """The SIGINT or SIGTERM that came within the with block; a second one ends the process as it does elsewhere."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # which alone can take signals
        yield received
        return

    def note(number: int, _: Any) -> None:
        received.append(number)
        signal.signal(number, before[number])

    before: dict[int, Any] = {number: signal.getsignal(number) or signal.SIG_DFL for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, note)
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
