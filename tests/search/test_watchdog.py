"""A search on which nobody works says so, and ends some day; one with workers hears nothing."""

from __future__ import annotations

import threading
import time
from io import StringIO
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from raysae.config import find_space, load_config
from raysae.errors import UserError
from raysae.pool import heartbeat
from raysae.search.interrupt import interruptible
from raysae.search.run import _guarded
from raysae.search.watchdog import PATIENCE_SECONDS, Watchdog


def watchdog(stop_after: float | None = 3600.0) -> Watchdog:
    return Watchdog("2 workers with 4 CPU(s) each", lambda: "8 CPUs are free", stop_after)


def test_nothing_is_said_while_there_are_workers():
    dog = watchdog()
    assert [dog.look(seconds) for seconds in (0.0, 5.0, PATIENCE_SECONDS - 1)] == [""] * 3
    assert dog.note == ""


def test_it_is_said_once_and_then_at_growing_intervals():
    dog = watchdog()
    said = [second for second in range(1000) if dog.look(float(second))]
    assert said == [60, 120, 240, 480, 960]


def test_what_is_said():
    line = watchdog().look(61.0)
    assert "no worker for 61 s: 8 CPUs are free; the search needs 2 workers with 4 CPU(s)" in line
    assert "stops after 3600 s, and can be gone on with" in line
    assert "stops" not in watchdog(None).look(61.0)


def test_a_worker_that_comes_is_the_end_of_it_and_one_that_goes_its_beginning():
    dog = watchdog()
    dog.look(70.0)
    assert dog.note == "no worker for 70 s"
    assert (dog.look(1.0), dog.note) == ("", "")
    assert dog.look(60.0)


def test_it_is_a_reason_to_stop_only_after_the_time_that_is_set():
    dog = watchdog(300.0)
    assert dog.reason_to_stop(299.0) == ""
    assert "no worker for 300 s (resources.worker_timeout)" in dog.reason_to_stop(300.0)
    assert watchdog(None).reason_to_stop(1e9) == ""


def test_a_time_too_short_for_a_cluster_to_grow_is_refused():
    with pytest.raises(UserError, match="worker_timeout"):
        load_config(find_space("orth.yaml"), {"resources.worker_timeout": 5})


class Broker:
    """Silent for longer and longer."""

    def __init__(self, silences: list[float]) -> None:
        self.silences = silences

    def __getattr__(self, name: str) -> Any:
        answers = {
            "health": lambda: ("", True),
            "silence": lambda: self.silences.pop(0) if len(self.silences) > 1 else self.silences[0],
        }
        return SimpleNamespace(remote=answers[name])


def test_a_search_without_workers_says_so_and_is_stopped(monkeypatch: pytest.MonkeyPatch):
    def get(answers: Any) -> Any:
        time.sleep(0.01)
        return answers

    monkeypatch.setattr("ray.get", get)
    wait = threading.Event.wait
    monkeypatch.setattr(threading.Event, "wait", lambda self, _=None: wait(self, 0.01))
    out = StringIO()
    console, broker = Console(file=out, width=300), Broker([1.0, 61.0, 62.0, 100.0, 301.0])
    with (
        pytest.raises(KeyboardInterrupt),
        interruptible() as interruption,
        _guarded(broker, SimpleNamespace(), interruption, watchdog(300.0), console),
    ):
        time.sleep(30)
    assert interruption.reason.startswith("no worker for 301 s")
    assert out.getvalue().count("no worker for 61 s") == 1
    assert "62 s" not in out.getvalue() and "100 s" not in out.getvalue()


def test_a_worker_is_heard_of_as_long_as_its_process_is_there(monkeypatch: pytest.MonkeyPatch):
    beats: list[float] = []
    broker = SimpleNamespace(alive=SimpleNamespace(remote=lambda: beats.append(time.monotonic())))
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.01)
    with pytest.raises(ZeroDivisionError), heartbeat.beating(broker):
        while len(beats) < 3:
            time.sleep(0.005)
        raise ZeroDivisionError
    count = len(beats)
    time.sleep(0.1)
    assert len(beats) == count
