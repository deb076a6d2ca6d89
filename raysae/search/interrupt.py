"""Ctrl-C, SIGTERM and errors of the whole search: stop cleanly once, at once the second time."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
INTERRUPTED = 130


class Interruption:
    """Whether the search is to stop, and why."""

    def __init__(self) -> None:
        self.reason = ""
        """Empty: somebody asked for it."""

    def stop(self, reason: str) -> None:
        """Interrupt the main thread, from another one."""
        self.reason = reason
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """The first signal raises KeyboardInterrupt in the main thread; the second ends the process.

    Ray's own processes end with the one that started them.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    seen = False

    def handle(_number: int, _frame: FrameType | None) -> None:
        nonlocal seen
        if seen:
            os._exit(INTERRUPTED)
        seen = True
        raise KeyboardInterrupt

    before: dict[int, Any] = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
