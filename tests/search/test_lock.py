"""One search at a time in a run folder, whatever became of the last one."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from raysae.errors import UserError
from raysae.search.interrupt import interruptible
from raysae.search.lock import lock

HOLD = """
import sys, time
from pathlib import Path
from raysae.search.lock import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_search_is_told_who_is_there_and_gets_in_when_that_is_killed(tmp_path: Path):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        told = f"another search.*process {other.pid} on"
        with pytest.raises(UserError, match=told), lock(tmp_path):
            pass
    finally:
        other.kill()
        other.wait()
    with lock(tmp_path):
        pass


def test_the_lock_is_free_after_an_error(tmp_path: Path):
    with pytest.raises(ZeroDivisionError), lock(tmp_path):
        raise ZeroDivisionError
    with lock(tmp_path):
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_is_an_interrupt_and_handlers_come_back(number: signal.Signals):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), interruptible():
        signal.raise_signal(number)
    assert signal.getsignal(number) == before


def test_the_second_signal_ends_the_process_at_once():
    script = """
import signal, time
from raysae.search.interrupt import interruptible
with interruptible():
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        signal.raise_signal(signal.SIGINT)
        time.sleep(60)
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=30).returncode == 130


def test_another_thread_can_stop_the_search_with_a_reason():
    import threading
    import time

    with pytest.raises(KeyboardInterrupt), interruptible() as interruption:
        threading.Timer(0.1, interruption.stop, ["the disk is full"]).start()
        time.sleep(30)
    assert interruption.reason == "the disk is full"
