"""One search at a time in a run folder, whatever became of the last one."""

from __future__ import annotations

import errno
import os
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


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said_to_be_one(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("raysae.search.lock.fcntl.flock", flock)
    told = r"has no locks.*-o flock.*set --out"
    with pytest.raises(UserError, match=told) as caught, lock(tmp_path):
        pass
    assert str(tmp_path) in str(caught.value) and os.strerror(number) in str(caught.value)


def test_another_error_of_a_lock_is_not_taken_for_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def flock(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("raysae.search.lock.fcntl.flock", flock)
    with pytest.raises(OSError, match="Input/output"), lock(tmp_path):
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
