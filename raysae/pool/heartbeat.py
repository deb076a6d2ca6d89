"""A worker's process says that it is there, from its first moment on and whatever it is busy with.

Training tells the broker of a trial often, but an import, a model, a harvest that is waited for or
a rung that is scored take minutes of silence.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

BEAT_SECONDS = 5.0


@contextmanager
def beating(broker: Any) -> Iterator[None]:
    """Tell the broker every few seconds, from a thread of its own."""
    done = threading.Event()

    def beat() -> None:
        while True:
            broker.alive.remote()
            if done.wait(BEAT_SECONDS):
                return

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
