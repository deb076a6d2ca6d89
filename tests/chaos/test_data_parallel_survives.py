"""A trial on two workers, of which one is killed, goes on and ends with what it learns undisturbed;
one that takes its workers down again and again ends, and the search goes on."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path

import psutil
import pytest
from victims import Search, differences, results

from raysae.journal import JOURNAL, ended_trials, read_journal

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

OPTIONS = [
    "--smoke",
    *("--num-samples", "3"),
    *("--set", "resources.workers=2"),
    *("--set", "resources.workers_per_trial=2"),
    *("--set", "resources.checkpoint_seconds=0.5"),
    *("--set", "search.seeds_per_trial=1"),
    *("--set", "search.scheduler.name=none"),
    *("--set", "training.batch_size=256"),
    *("--set", "training.tokens=131072"),
]
KILLS = 3
SEED = 0


def oldest_first(processes: list[psutil.Process]) -> list[psutil.Process]:
    return sorted(processes, key=lambda process: process.pid)


def test_one_of_two_workers_is_killed_and_the_trial_goes_on(tmp_path: Path):
    rng = random.Random(SEED)
    alone, out = tmp_path / "alone", tmp_path / "run"
    search = Search(alone, *OPTIONS, "--out", str(alone))
    assert search.wait(400) == 0, search.tail()
    search = Search(out, *OPTIONS, "--out", str(out))
    starts = 0
    for kill in range(KILLS):
        assert search.wait_for_more("start", starts, 240), search.tail()
        time.sleep(rng.uniform(1, 4))
        assert not search.ended, "the search ended before everything was tried: make it longer"
        starts = search.events("start")
        workers = oldest_first(search.children("worker"))
        assert len(workers) == 2
        workers[kill % 2].kill()
    assert search.wait(400) == 0, search.tail()
    assert search.events("start") > len(results(out)), "no trial was taken again"
    assert differences(results(out), results(alone)) == []


def test_a_trial_that_takes_its_workers_down_fails_and_the_others_do_not(tmp_path: Path):
    """Killed whenever it is taken; once or twice it may get further before."""
    out = tmp_path / "run"
    search = Search(out, *OPTIONS, "--out", str(out))

    def of_first(event: str) -> int:
        records = read_journal(out / JOURNAL)
        return sum(r["event"] == event and r["trial"] == 0 for r in records)

    for kills in range(6):
        search.wait_until(lambda n=kills: of_first("start") > n or of_first("end") > 0, 240)
        if of_first("end"):
            break
        oldest_first(search.children("worker"))[0].kill()
    search.wait(400)
    ends = {end["trial"]: end for end in ended_trials(read_journal(out / JOURNAL))}
    assert {number: end["state"] for number, end in ends.items()} == {
        0: "failed",
        1: "finished",
        2: "finished",
    }
    assert re.fullmatch(r"its worker died \d times at the same place", ends[0]["error"])
