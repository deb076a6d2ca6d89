"""A trial's several SAEs as one record, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from raysae.analysis.seeds import mean_curve, over_seeds, seed_records


def record(score: float, status: str = "ok", **other: Any) -> dict[str, Any]:
    return {
        "step": 10,
        "objective": score + 0.1,
        "score": score,
        "heldout_score": score / 2,
        "transferred_score": score / 3,
        "saebench_score": score / 4,
        "dense_features": 3,
        "train_seconds": 1.5,
        "score_seconds": 0.25,
        "status": status,
        "cause": f"because of {score}",
        "metrics": {"loss": 10 * score, "alpha": 0.5},
        "sparse_probing": None,
        "result": {"of": score},
        **other,
    }


def test_one_seed_is_the_trial():
    only = record(0.3)
    assert over_seeds([only]) is only
    assert seed_records(only) == [only]


def test_numbers_are_means_and_times_are_sums():
    trial = over_seeds([record(0.6), record(0.1), record(0.2)])
    assert trial["score"] == pytest.approx(0.3)
    assert trial["objective"] == pytest.approx(0.4)
    assert trial["heldout_score"] == pytest.approx(0.15)
    assert trial["transferred_score"] == pytest.approx(0.1)
    assert trial["metrics"] == pytest.approx({"loss": 3.0, "alpha": 0.5})
    assert (trial["train_seconds"], trial["score_seconds"]) == (4.5, 0.75)
    assert trial["step"] == 10


def test_the_spread_is_the_sample_standard_deviation():
    trial = over_seeds([record(0.6), record(0.1), record(0.2)])
    deviations = (0.3, -0.2, -0.1)
    expected = (sum(d * d for d in deviations) / 2) ** 0.5
    assert trial["score_std"] == pytest.approx(expected)
    assert trial["heldout_score_std"] == pytest.approx(expected / 2)
    assert trial["transferred_score_std"] == pytest.approx(expected / 3)
    assert trial["saebench_score_std"] == pytest.approx(expected / 4)


def test_scores_that_no_seed_was_asked_for_stay_missing():
    unasked = ("heldout_score", "transferred_score", "saebench_score")
    missing = dict.fromkeys(unasked) | {"questions": "search half"}
    trial = over_seeds([record(0.6, **missing), record(0.2, **missing)])
    assert (trial["score"], trial["questions"]) == (pytest.approx(0.4), "search half")
    for name in unasked:
        assert trial[name] is None and trial[f"{name}_std"] is None


@pytest.mark.parametrize(
    ("scores", "typical"), [([0.6, 0.1, 0.2], 2), ([0.5, 0.4], 1), ([0.1, 0.4, 0.3, 0.2], 3)]
)
def test_what_is_no_number_is_the_median_seeds(scores: list[float], typical: int):
    seeds = [record(score, status=f"status {i}") for i, score in enumerate(scores)]
    trial = over_seeds(seeds)
    assert trial["typical_seed"] == typical
    assert trial["status"] == f"status {typical}"
    assert trial["result"] == {"of": scores[typical]}
    assert trial["cause"].endswith(f"because of {scores[typical]}")
    assert all(f"{score:.3f}" in trial["cause"] for score in scores)
    assert seed_records(trial) == seeds


def test_probing_is_averaged_where_all_were_probed():
    probed = [record(0.1, sparse_probing={"sae_top_1": x}) for x in (0.5, 0.9)]
    assert over_seeds(probed)["sparse_probing"] == pytest.approx({"sae_top_1": 0.7})
    assert over_seeds([probed[0], record(0.2)])["sparse_probing"] is None


def test_curves_are_averaged_row_by_row_and_steps_stay_whole():
    curves = [[{"step": s, "loss": s * x} for s in (1, 2)] for x in (1.0, 3.0)]
    assert mean_curve(curves) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 4.0}]
    assert isinstance(mean_curve(curves)[0]["step"], int)
