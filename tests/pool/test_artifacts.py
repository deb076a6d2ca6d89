"""What a rung leaves in the journal and on disk: what the sampler is told, and what it is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sae_lens import SAE
from sklearn.metrics import adjusted_rand_score

from raysae.pool.artifacts import GROUPS_FILE, Artifacts
from raysae.pool.folder import RESULT_FILE, SAE_FOLDER, TRIAL_FILE
from raysae.training.loop import train_one
from raysae.training.run import Progress, Rung, SAERun
from raysae.training.spec import TrialSpec
from raysae.unlearning import default_eval_config, split_questions
from raysae.unlearning.grid import GridPoint
from raysae.unlearning.result import UnlearningResult, make_result
from raysae.unlearning.scoring import unlearning_score
from raysae.worlds import load_world
from raysae.worlds.world import FORGET_SET, RETAIN_SETS

SPLIT_SEED = 11


def lopsided() -> UnlearningResult:
    """One intervention: 6 of 10 questions to forget go wrong on the search half, 1 on the other.

    Of 400 questions to retain 2 are lost, both in the search half: it keeps 99 % of its 200.
    """
    counts = {FORGET_SET: 20} | dict.fromkeys(RETAIN_SETS, 100)
    chosen = split_questions(counts, SPLIT_SEED)
    right = {name: np.ones((1, n), dtype=bool) for name, n in counts.items()}
    right[FORGET_SET][0, np.flatnonzero(chosen[FORGET_SET])[:6]] = False
    right[FORGET_SET][0, np.flatnonzero(~chosen[FORGET_SET])[:1]] = False
    right[RETAIN_SETS[0]][0, np.flatnonzero(chosen[RETAIN_SETS[0]])[:2]] = False
    return make_result(
        evaluator="cached",
        score=unlearning_score(right),
        grid=[GridPoint(0.01, 10, 100, (0, 1))],
        is_correct=right,
        baseline={name: np.ones(n, dtype=bool) for name, n in counts.items()},
        forget_sparsity=np.full(32, 0.5),
        retain_sparsity=np.zeros(32),
        eligible={0.001: 1, 0.01: 2},
    )


@pytest.fixture
def write(make_spec, make_store, tmp_path: Path) -> Callable[..., tuple[TrialSpec, Any]]:
    """Train for two steps and write the rung; its record."""

    def make(
        frontier_weight: float, result: UnlearningResult | None = None
    ) -> tuple[TrialSpec, dict[str, Any]]:
        world = load_world("embedded")
        artifacts = Artifacts(
            folder=tmp_path / "trial",
            world=world,
            hook_name=world.default_hook_name,
            eval_config=default_eval_config(world),
            split_seed=SPLIT_SEED,
            frontier_weight=frontier_weight,
        )
        spec = make_spec(steps=2, number=5)
        events: list[Progress | Rung] = []
        run = SAERun(spec, make_store(d_in=128))
        found = result or lopsided()
        train_one(run, lambda *_: found, lambda event: events.append(event) or True)
        (rung,) = (event for event in events if isinstance(event, Rung))
        return spec, artifacts.write(spec, rung)

    return make


def test_the_sampler_is_told_the_search_half_and_the_other_is_beside_it(write):
    _, record = write(0.0)
    assert record["objective"] == record["score"] == pytest.approx(0.6)
    assert record["heldout_score"] == pytest.approx(0.1)
    assert record["transferred_score"] == record["heldout_score"]  # there is one intervention
    assert record["saebench_score"] == pytest.approx(7 / 20)
    assert record["status"] == "ok"
    assert "4 of 10 forget questions" in record["cause"]
    assert record["halves"]["search"]["score"] == pytest.approx(0.6)
    assert record["halves"]["transferred"]["forget_correct"] == 9
    assert record["halves"]["transferred"]["status"] == "ok"
    assert record["result"]["score"] == pytest.approx(7 / 20)


def test_the_frontier_adds_to_what_the_sampler_is_told_and_not_to_the_score(write):
    _, record = write(0.5)
    # 0.99 of the retain questions are kept: 91 of the 101 levels from 0.9 to 1
    assert record["objective"] == pytest.approx(0.6 + 0.5 * 0.6 * 91 / 101)
    assert record["score"] == pytest.approx(0.6)


def test_a_record_is_plain_data_and_the_folder_holds_the_trial(write, tmp_path: Path):
    spec, record = write(0.0)
    text = json.dumps(record, allow_nan=False)
    assert json.dumps(json.loads(text)) == text
    folder = tmp_path / "trial"
    about = json.loads((folder / TRIAL_FILE).read_text())
    assert TrialSpec(**about["spec"]) == spec
    assert (about["training_steps"], about["tokens"]) == (record["step"], record["tokens"])
    result = json.loads((folder / RESULT_FILE).read_text())
    score = result["eval_result_metrics"]["unlearning"]["unlearning_score"]
    assert score == pytest.approx(7 / 20)  # SAEBench's own, on all questions
    assert SAE.load_from_disk(folder / SAE_FOLDER).W_dec.shape == (32, 128)


def test_of_the_search_half_alone_there_is_its_score_and_no_other(write, tmp_path: Path):
    """What the sampler is told is the same; the rest is missing, not 0."""
    whole = lopsided()
    _, record = write(0.5, whole)
    result = tmp_path / "trial" / RESULT_FILE
    assert result.is_file() and record["questions"] == "all"

    counts = {name: rows.shape[1] for name, rows in whole.is_correct.items()}
    _, half = write(0.5, whole.on(split_questions(counts, SPLIT_SEED)))
    json.dumps(half, allow_nan=False)
    assert half["questions"] == "search half"
    for name in ("heldout_score", "transferred_score", "saebench_score"):
        assert half[name] is None
    assert (half["halves"]["heldout"], half["halves"]["transferred"]) == (None, None)
    for name in ("objective", "score", "status", "cause", "dense_features", "conditioning"):
        assert half[name] == record[name], name
    assert half["halves"]["search"] == record["halves"]["search"]
    (only,) = half["result"]["interventions"]
    assert (only["forget_correct"], only["forget_total"], only["retain_total"]) == (4, 10, 200)
    assert not result.exists(), "SAEBench's score is that of all questions"
    assert SAE.load_from_disk(tmp_path / "trial" / SAE_FOLDER).W_dec.shape == (32, 128)


def test_groups_are_compared_with_the_rung_before_and_kept(make_spec, make_store, tmp_path: Path):
    """Two rungs of one trial; then the trial begins again and its first rung has none before."""
    world = load_world("embedded")
    artifacts = Artifacts(
        folder=tmp_path / "trial",
        world=world,
        hook_name=world.default_hook_name,
        eval_config=default_eval_config(world),
        split_seed=SPLIT_SEED,
        frontier_weight=0.0,
    )
    method = {"group_update_period": 2, "n_groups": 3}
    spec = make_spec("topk", "grouped", method, number=5, steps=8, rungs=(2 * 64, 8 * 64))
    events: list[Progress | Rung] = []
    run = SAERun(spec, make_store(d_in=128))
    train_one(run, lambda *_: lopsided(), lambda event: events.append(event) or True)
    first, last = (event for event in events if isinstance(event, Rung))

    def index(rung: Rung) -> float | None:
        return artifacts.write(spec, rung)["conditioning"][0]["adjusted_rand_index"]

    assert index(first) is None
    expected = adjusted_rand_score(first.groups, last.groups)
    assert index(last) == pytest.approx(expected)
    with np.load(tmp_path / "trial" / GROUPS_FILE) as kept:
        assert sorted(kept.files, key=int) == ["2", "8"]
        np.testing.assert_array_equal(kept["8"], last.groups.numpy())
    assert index(first) is None


def test_dense_features_are_counted(write):
    _, record = write(0.0)
    run_rates = record["dense_features"]
    assert isinstance(run_rates, int)
    assert 0 < run_rates <= 32  # 4 of 32 features a token: 12.5 % each on average
