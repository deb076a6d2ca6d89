"""A search whose worker trains two trials together has the results of one trial after the other."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rich.console import Console

from raysae.config import find_space, load_config
from raysae.journal import JOURNAL, read_journal
from raysae.search.run import resolve, run_search

pytestmark = pytest.mark.search

SETTINGS = {
    "training.tokens": 32_768,
    "training.batch_size": 64,
    # Of what picks its features or groups, rounding may decide between two that are nearly equal.
    "sae": {"architecture": "standard", "d_sae": 256},
    "space.sae": {"l1_coefficient": {"float": [1.0, 8.0], "log": True}},
    "space.regularizer": {"none": None, "fixed_orthogonal": None, "importance": None},
    "objective.frontier_weight": 1.0,  # or most of such short trials would score alike
    "search.num_samples": 4,
    "search.sampler": "random",  # trial n is the same whatever came before it
    "search.seeds_per_trial": 1,
    "search.scheduler": {"name": "asha", "grace_fraction": 0.5, "reduction_factor": 2},
    "confirm.top": 0,
    "resources.workers": 1,
}


def search(out: Path, trials_per_pack: int) -> list[dict[str, Any]]:
    overrides = SETTINGS | {"resources.trials_per_pack": trials_per_pack}
    out.mkdir()
    config = resolve(load_config(find_space("orth.yaml"), overrides))
    outcome = run_search(config, out, Console(quiet=True))
    assert (outcome.trials, outcome.failed) == (4, 0), outcome.first_error
    return read_journal(out / JOURNAL)


class Result(NamedTuple):
    scores: list[float]
    losses: list[float]


def results(records: list[dict[str, Any]]) -> dict[tuple[int, int], Result]:
    """By trial and tokens of the rung; at the first one the scores are of the search half."""
    found = {}
    for rung in records:
        if rung["event"] != "rung":
            continue
        names = ["objective", "score"]
        if rung["questions"] == "all":
            names += ["heldout_score", "saebench_score"]
        losses = [row["loss"] for row in rung["curve"]]
        scores = [rung[name] for name in names]
        found[rung["trial"], rung["tokens"]] = Result(scores, losses)
    return found


def test_two_trials_at_a_time_score_what_one_at_a_time_does(tmp_path: Path):
    packed = search(tmp_path / "packed", trials_per_pack=2)
    alone = search(tmp_path / "alone", trials_per_pack=1)
    packs: defaultdict[int, list[int]] = defaultdict(list)
    for record in packed:
        if record["event"] == "start":
            packs[record["pack"]].append(record["trial"])
    states = {record["trial"]: record["state"] for record in packed if record["event"] == "end"}
    ends = [{states[number] for number in pack} for pack in packs.values() if len(pack) == 2]
    assert {"finished", "stopped"} in ends, "somebody must have left a pack that went on"

    found, expected = results(packed), results(alone)
    for records in (packed, alone):
        asked = {(r["questions"], r["last"]) for r in records if r["event"] == "rung"}
        assert asked == {("search half", False), ("all", True)}
    common = found.keys() & expected.keys()
    assert {(number, 16_384) for number in range(4)} <= common
    assert any(tokens == 32_768 for _, tokens in common)
    alike = set()
    for key in common:
        assert len(found[key].losses) == len(expected[key].losses)
        assert found[key].losses == pytest.approx(expected[key].losses, rel=1e-3), key
        # A pack is dense or sparse as a whole, and sums round otherwise. Where that has not grown,
        # the SAE is the same; elsewhere a question more or less decides whether a score is 0.
        if found[key].losses == pytest.approx(expected[key].losses, rel=1e-5):
            assert found[key].scores == pytest.approx(expected[key].scores, rel=1e-3, abs=1e-6), key
            alike.add(key)
    assert len({number for number, _ in alike}) >= 3
    assert any(tokens == 32_768 for _, tokens in alike)
