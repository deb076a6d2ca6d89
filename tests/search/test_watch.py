"""The thread that watches a search: it loses nothing, and cannot take the search with it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from rich.console import Console
from test_tensorboard import scalars

from raysae.journal import JOURNAL, JournalTail
from raysae.search import watch
from raysae.search.progress import Expected, Standing
from raysae.search.status import read_status
from raysae.search.watch import Watch


class Search:
    """A broker and its journal, played by the test."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.trials: list[dict[str, Any]] = []
        self.curves: dict[int, list[dict[str, Any]]] = {}
        self.asked: list[dict[int, int]] = []
        self.error: Exception | None = None
        self.tiers: list[str] = []

    def poll(self, seen: dict[int, int]) -> Any:
        if self.error is not None:
            raise self.error
        self.asked.append(dict(seen))
        rows = {
            number: [row for row in curve if row["step"] > seen.get(number, -1)]
            for number, curve in self.curves.items()
        }
        snapshot = {"trials": list(self.trials), "store_ready": True, "tiers": list(self.tiers)}
        return snapshot, rows

    def write(self, record: dict[str, Any]) -> None:
        with (self.run_dir / JOURNAL).open("a") as file:
            file.write(json.dumps(record) + "\n")

    def wait_for(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < end, "the watcher did not look"
            time.sleep(0.005)


@pytest.fixture
def search(tmp_path: Path) -> Search:
    return Search(tmp_path)


@pytest.fixture
def gauged(monkeypatch) -> list[Standing]:
    """What the gauges were told, which need Ray."""
    told: list[Standing] = []

    class Gauges:
        def __init__(self, run: str) -> None:
            assert run

        def update(self, standing: Standing) -> None:
            told.append(standing)

    monkeypatch.setattr(watch, "SearchGauges", Gauges)
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.01)
    return told


@pytest.fixture
def watched(search: Search, gauged: list[Standing]) -> tuple[Watch, StringIO]:
    assert gauged == []
    out = StringIO()
    made = Watch(
        Console(file=out, width=100),
        search.poll,
        search.run_dir,
        Expected(2, 1),
        dashboard="http://here",
        metrics=[],
        started=time.time(),
    )
    return made, out


def row(step: int) -> dict[str, Any]:
    return {"step": step, "tokens": 64 * step, "loss": 1 / step}


def trial(spec: dict[str, Any], state: str, **changes: Any) -> dict[str, Any]:
    made = {"number": spec["number"], "state": state, "spec": spec, "error": "", "rung": {}}
    return made | {"started": time.time(), "tokens": 64} | changes


def end(spec: dict[str, Any], score: float, steps: int) -> dict[str, Any]:
    rung = {"step": steps, "tokens": 64 * steps, "score": score, "status": "ok"}
    rung |= {"heldout_score": score / 2, "saebench_score": score / 4, "metrics": {}}
    record = {"event": "end", "trial": spec["number"], "state": "finished", "spec": spec}
    curve = [row(step) for step in range(1, steps + 1)]
    return record | {"error": "", "rung": rung, "curve": curve, "started": 1.0, "ended": 2.0}


def test_the_tier_of_the_store_is_said_once_it_is_known(search: Search, watched):
    made, out = watched
    status = search.run_dir / "status.json"
    with made:
        search.wait_for(status.exists)
        assert "batches:" not in out.getvalue()
        search.tiers = ["shared memory"]
        search.wait_for(lambda: "batches:" in out.getvalue())
        search.tiers = ["a copy on cuda:0 [1]", "shared memory"]  # a node that has joined
        looks = len(search.asked)
        search.wait_for(lambda: len(search.asked) > looks + 2)
    lines = [line for line in out.getvalue().splitlines() if line.startswith("batches:")]
    assert lines == ["batches: from shared memory", "batches: from a copy on cuda:0 [1]"]
    places = read_status(search.run_dir).view.places
    assert [words for name, words in places if name == "batches"] == [
        "from a copy on cuda:0 [1]", "from shared memory"
    ]  # fmt: skip


def test_every_observer_is_told_and_the_last_look_comes_after_the_end(
    search: Search, watched, gauged: list[Standing], make_spec
):
    looking, out = watched
    spec = make_spec(number=0).to_dict()
    with looking:
        search.trials = [trial(spec, "running")]
        search.curves = {0: [row(1)]}
        search.wait_for(lambda: {0: 1} in search.asked)
        assert read_status(search.run_dir).state == "running"
        # All of this happens after the thread's last poll but one.
        search.curves = {0: [row(1), row(2), row(3)]}
        search.write(end(spec, 0.25, 3))
        rung = {"score": 0.25, "status": "ok"}
        search.trials = [trial(spec, "finished", rung=rung)]
    found = scalars(search.run_dir / "tensorboard" / "0000")
    assert [step for step, _ in found["train/loss"]] == [1, 2, 3]
    assert found["score/search"] == [(3, 0.25)]
    assert gauged[-1].counts["finished"] == 1
    lines = out.getvalue().splitlines()
    assert len(lines) == 2
    assert "trial   0 finished  0.250" in lines[0]
    assert "1 of 3 trials have ended" in lines[1]
    later = time.time() + 60
    assert read_status(search.run_dir, now=later).state == "stopped"


def test_a_confirmation_of_fewer_trials_lowers_the_total(
    search: Search, watched, gauged: list[Standing]
):
    with watched[0] as looking:
        search.wait_for(lambda: bool(gauged))
        assert gauged[-1].total == 3
        looking.confirm(0)
    assert gauged[-1].total == 2


def test_what_ended_under_an_earlier_start_is_shown(
    search: Search, watched, gauged: list[Standing], make_spec
):
    search.write(end(make_spec(number=0).to_dict(), 0.5, 2))
    with watched[0]:
        search.trials = [trial(make_spec(number=1).to_dict(), "running")]
        search.wait_for(lambda: bool(gauged) and bool(gauged[-1].running))
    assert [t["number"] for t in gauged[-1].trials] == [0, 1]
    assert gauged[-1].best is not None and gauged[-1].best["number"] == 0


def test_what_fails_is_left_out_and_said_and_the_rest_goes_on(
    search: Search, watched, monkeypatch, make_spec
):
    looking, out = watched
    spec = make_spec(number=0).to_dict()
    monkeypatch.setattr(watch.TensorBoardLog, "curve", Mock(side_effect=OSError("no space [left]")))
    with looking:
        search.trials, search.curves = [trial(spec, "running")], {0: [row(1)]}
        search.wait_for(lambda: bool(looking._problems))
        search.trials = [trial(spec, "finished", rung={"score": 0.25, "status": "ok"})]
    text = out.getvalue()
    assert "trial   0 finished  0.250" in text
    assert text.count("TensorBoard's files ended early") == 1
    assert "OSError: no space [left]" in text
    assert read_status_is_over(search.run_dir)


def test_a_watcher_that_cannot_ask_says_so_and_the_search_goes_on(search: Search, watched):
    looking, out = watched
    reached = False
    with looking:
        search.error = RuntimeError("no space left on [device]")
        search.wait_for(lambda: not looking._thread.is_alive())
        reached = True
    assert reached
    assert "nobody watched to the end" in out.getvalue()
    assert "RuntimeError: no space left on [device]" in out.getvalue()


def test_an_error_of_the_search_is_not_hidden(search: Search, watched):
    with pytest.raises(KeyboardInterrupt), watched[0]:
        raise KeyboardInterrupt
    assert read_status_is_over(search.run_dir)


def read_status_is_over(run_dir: Path) -> bool:
    return bool(json.loads((run_dir / "status.json").read_text())["over"])


def test_the_tail_gives_every_record_once_and_only_whole_ones(tmp_path: Path):
    path = tmp_path / JOURNAL
    tail = JournalTail(path)
    assert tail.new() == []
    path.write_bytes('{"a": 1}\n{"b": "é'.encode()[:-1])
    assert tail.new() == [{"a": 1}]
    assert tail.new() == []
    with path.open("ab") as file:
        file.write("é".encode()[-1:] + b'"}\n')
    assert tail.new() == [{"b": "é"}]
