"""Trials trained two at a time, whose worker, broker and driver are killed, score what each scores
alone and undisturbed."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
from victims import Search

from raysae.journal import JOURNAL, ended_trials, read_journal

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

OPTIONS = [
    "--smoke",
    *("--num-samples", "4"),
    *("--set", "resources.workers=1"),
    *("--set", "resources.checkpoint_seconds=0.5"),
    *("--set", "search.sampler=random"),  # what comes next does not depend on what was first
    *("--set", "search.seeds_per_trial=1"),
    *("--set", "search.scheduler.name=none"),
    # Top-k SAEs, which come out of a pack bit for bit as they do alone.
    *("--set", "space.regularizer={none: , fixed_orthogonal: , importance: }"),
    *("--set", "training.batch_size=256"),
    *("--set", "training.tokens=131072"),
]
PACKED = [*OPTIONS, "--set", "resources.trials_per_pack=2"]
VICTIMS = ["worker", "broker", "interrupt", "worker"]
SEED = 0


def ends(out: Path) -> dict[int, dict[str, Any]]:
    return {record["trial"]: record for record in ended_trials(read_journal(out / JOURNAL))}


def packs(out: Path) -> list[tuple[int, int]]:
    """Of every time that a worker took a trial: the pack's first trial, and the trial."""
    records = read_journal(out / JOURNAL)
    return [(r["pack"], r["trial"]) for r in records if r["event"] == "start"]


def test_packs_that_are_killed_end_with_the_scores_of_each_trial_alone(tmp_path: Path):
    rng = random.Random(SEED)
    alone, out = tmp_path / "alone", tmp_path / "packed"
    search = Search(alone, *OPTIONS, "--out", str(alone))
    assert search.wait(400) == 0, search.tail()
    search = Search(out, *PACKED, "--out", str(out))
    starts = 0
    for victim in VICTIMS:
        search.wait_for_more("start", starts, 240)
        time.sleep(rng.uniform(1, 4))
        assert not search.ended, "the search ended before everything was tried: make it longer"
        starts = search.events("start")
        if victim == "interrupt":
            search.process.send_signal(2)
            assert search.wait(90) == 130, search.tail()
            search = Search(out, "--resume", str(out))
        else:
            search.kill_all(victim)
        if victim == "broker":
            starts -= 1  # no worker was lost
    assert search.wait(400) == 0, search.tail()

    again = [pack for pack in set(packs(out)) if packs(out).count(pack) > 1]
    assert any(first != number for first, number in again), "some were taken up again together"
    found, expected = ends(out), ends(alone)
    assert found.keys() == expected.keys() == set(range(4))
    for number, end in found.items():
        wanted = expected[number]
        assert (end["state"], end["spec"]) == (wanted["state"], wanted["spec"])
        for name in ("score", "heldout_score", "saebench_score"):
            assert end["rung"][name] == wanted["rung"][name]
        losses = [[(row["step"], row["loss"]) for row in r["curve"]] for r in (end, wanted)]
        assert losses[0] == losses[1]
