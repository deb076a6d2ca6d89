"""A study's runs side by side: means, spreads and differences against numbers found by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_1samp
from statsmodels.stats.multitest import multipletests

from raysae.analysis import statistics
from raysae.analysis.runs import FIGURES, RUN_COLUMNS, runs_table


def trial(number: int, run: str, seed: int, score: float, **changes: Any) -> dict[str, Any]:
    """A row of a trials table; every figure but the scores is 10 times the score."""
    row = {
        "trial": number,
        "run": run,
        "state": "finished",
        "seed": seed,
        "status": "ok" if score else "no_effect",
        "regularizer": "none" if run == "base" else "grouped",
        "training_steps": 100,
    }
    return row | dict.fromkeys(FIGURES, 10 * score) | {
        "score": score,
        "heldout_score": score,
        "saebench_score": score,
    } | changes  # fmt: skip


def failed(number: int, run: str, seed: int) -> dict[str, Any]:
    nothing = dict.fromkeys(FIGURES, np.nan) | {"score": 0.0, "heldout_score": 0.0}
    changes = {"state": "failed", "status": "failed", "training_steps": 0}
    return trial(number, run, seed, 0.0, **changes) | nothing


def table(*rows: dict[str, Any]) -> pd.DataFrame:
    return runs_table(pd.DataFrame(list(rows))).set_index("run")


def test_every_column_is_documented():
    runs = table(trial(0, "base", 0, 0.2), trial(1, "strong", 0, 0.5)).reset_index()
    assert set(runs.columns) == set(RUN_COLUMNS)


def test_means_and_spreads_are_those_of_the_seeds():
    runs = table(
        trial(0, "base", 0, 0.2),
        trial(1, "strong", 0, 0.5, heldout_score=0.3),
        trial(2, "base", 1, 0.4),
        trial(3, "strong", 1, 0.6, heldout_score=0.1),
        trial(4, "base", 2, 0.6),
    )
    assert list(runs.index) == ["base", "strong"]
    base, strong = runs.loc["base"], runs.loc["strong"]
    assert (base["seeds"], base["failed"], base["training_steps"]) == (3, 0, 100)
    assert (base["score"], base["score_std"]) == pytest.approx((0.4, 0.2))
    assert (base["l0"], base["l0_std"]) == pytest.approx((4.0, 2.0))
    assert (strong["seeds"], strong["score"]) == (2, pytest.approx(0.55))
    assert (strong["heldout_score"], strong["heldout_score_std"]) == pytest.approx(
        (0.2, 0.1 * 2**0.5)
    )


@pytest.mark.parametrize("figure", FIGURES)
def test_every_figure_has_its_mean_and_spread(figure: str):
    rows = [trial(i, "base", i, 0.5) | {figure: x} for i, x in enumerate((1.0, 2.0, 6.0))]
    found = table(*rows).loc["base"]
    assert (found[figure], found[f"{figure}_std"]) == pytest.approx((3.0, 7**0.5))


def test_one_seed_has_a_mean_and_no_spread():
    found = table(trial(0, "base", 0, 0.2)).loc["base"]
    assert (found["seeds"], found["score"]) == (1, 0.2)
    assert np.isnan(found["score_std"])


def test_a_failed_seed_is_counted_and_left_out_of_every_mean():
    runs = table(
        trial(0, "base", 0, 0.2), failed(1, "base", 1), trial(2, "base", 2, 0.4),
        failed(3, "broken", 0), failed(4, "broken", 1),
    )  # fmt: skip
    base, broken = runs.loc["base"], runs.loc["broken"]
    assert (base["seeds"], base["failed"], base["score"]) == (2, 1, pytest.approx(0.3))
    assert (base["training_steps"], base["zeros"]) == (100, "")
    assert (broken["seeds"], broken["failed"], broken["training_steps"]) == (0, 2, 0)
    assert broken[["score", "l0", "score_std"]].isna().all()
    assert broken["zeros"] == ""


def test_zeros_are_counted_by_cause():
    runs = table(
        trial(0, "base", 0, 0.0),
        trial(1, "base", 1, 0.0, status="retain_gate_failed"),
        trial(2, "base", 2, 0.0),
        trial(3, "base", 3, 0.3),
        trial(4, "strong", 0, 0.5),
    )
    assert runs.loc["base", "zeros"] == "2 × no_effect, 1 × retain_gate_failed"
    assert runs.loc["strong", "zeros"] == ""


def test_the_shortest_seed_is_shown():
    runs = table(trial(0, "base", 0, 0.2), trial(1, "base", 1, 0.4, training_steps=60))
    assert runs.loc["base", "training_steps"] == 60


def test_trials_of_no_run_are_left_out():
    assert list(table(trial(0, "", 0, 0.2), trial(1, "base", 0, 0.2)).index) == ["base"]
    assert runs_table(pd.DataFrame([trial(0, "", 0, 0.2)])).empty


def test_differences_to_the_baseline_are_taken_seed_by_seed_on_the_held_out_half():
    runs = table(
        trial(0, "base", 5, 0.9, heldout_score=0.2),
        trial(1, "base", 6, 0.9, heldout_score=0.3),
        trial(2, "base", 7, 0.9, heldout_score=0.1),
        trial(3, "strong", 7, 0.1, heldout_score=0.5),  # another order of the seeds
        trial(4, "strong", 5, 0.1, heldout_score=0.3),
        trial(5, "strong", 6, 0.1, heldout_score=0.2),
    )
    strong = runs.loc["strong"]
    assert strong["difference"] == pytest.approx((0.4 + 0.1 - 0.1) / 3)
    # an interval of 95 % over three values reaches from the smallest to the largest
    interval = (strong["difference_low"], strong["difference_high"])
    assert interval == pytest.approx((-0.1, 0.4))
    assert strong["ahead"] == 2
    assert np.isnan(runs.loc["base", "difference"])


def test_a_difference_needs_the_seed_on_both_sides():
    runs = table(
        trial(0, "base", 0, 0.2), failed(1, "base", 1), trial(2, "base", 2, 0.3),
        trial(3, "strong", 0, 0.6), trial(4, "strong", 1, 0.9), failed(5, "strong", 2),
        trial(6, "other", 1, 0.9),
    )  # fmt: skip
    assert runs.loc["strong", "difference"] == pytest.approx(0.4)
    assert np.isnan(runs.loc["other", "difference"])


def study(differences: dict[str, list[float]]) -> pd.DataFrame:
    """Runs beside a baseline of 0.3 at every seed."""
    seeds = len(next(iter(differences.values())))
    rows = [trial(0, "base", seed, 0.3) for seed in range(seeds)]
    rows += [
        trial(1 + number, run, seed, 0.3 + value)
        for number, (run, values) in enumerate(differences.items())
        for seed, value in enumerate(values)
    ]
    return table(*rows)


def test_one_seed_shows_no_difference():
    """Of one difference every resample is the same."""
    runs = study({"strong": [0.2], "weak": [-0.2]})
    assert runs.loc["strong", "difference"] == pytest.approx(0.2)
    assert runs[["difference_low", "difference_high"]].isna().all(axis=None)
    assert (runs.loc[["strong", "weak"], "p_holm"] == 1).all()
    assert not runs.loc[["strong", "weak"], ["beats", "worse"]].any(axis=None)


def test_a_difference_is_tested_seed_by_seed_and_corrected_for_the_number_of_runs():
    differences = {
        "strong": [0.10, 0.12, 0.11, 0.13],
        "weak": [-0.10, -0.12, -0.11, -0.13],
        "lead": [0.01, 0.06, 0.05, 0.04],  # alone a find
        "nothing": [0.1, -0.1, 0.02, -0.02],
    }
    runs = study(differences)
    p = {run: ttest_1samp(values, 0).pvalue for run, values in differences.items()}
    corrected = multipletests(list(p.values()), method="holm")[1]
    assert p["lead"] < 0.05 < 2 * p["lead"]
    assert runs["p"].dropna().to_dict() == pytest.approx(p)
    np.testing.assert_allclose(runs["p_holm"].dropna(), corrected)
    assert runs.loc["lead", "difference_low"] > 0
    assert runs["beats"].eq(True).to_dict() == {**dict.fromkeys(runs.index, False), "strong": True}
    assert runs["worse"].eq(True).to_dict() == {**dict.fromkeys(runs.index, False), "weak": True}


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_of_studies_without_a_difference_few_have_a_run_that_is_ahead(seeds: int, monkeypatch):
    """Eleven runs beside one baseline, whose luck they share."""
    monkeypatch.setattr(statistics, "RESAMPLES", 400)
    rng = np.random.default_rng(0)
    studies, found = 100, 0
    for _ in range(studies):
        scores = rng.normal(0.3, 0.05, (12, seeds))
        rows = [
            trial(run, "base" if run == 0 else f"run {run}", seed, scores[run, seed])
            for run in range(12)
            for seed in range(seeds)
        ]
        found += table(*rows)["beats"].eq(True).any()
    assert found / studies <= 0.06  # of 100 at 2.5 %, that many or fewer are seen in 99 %


def test_without_a_baseline_there_are_no_differences():
    runs = table(trial(0, "strong", 0, 0.6), trial(1, "other", 0, 0.2))
    assert "difference" not in runs or runs["difference"].isna().all()
    assert list(runs["score"]) == [0.6, 0.2]


def test_a_run_is_compared_with_the_baseline_of_its_own_sparsity_and_training():
    runs = table(
        trial(0, "base", 5, 0.2, k=4.0, **{"training.lr": 0.1}),
        trial(1, "base k=8", 5, 0.7, k=8.0, regularizer="none", **{"training.lr": 0.1}),
        trial(2, "strong k=8", 5, 0.6, k=8.0, **{"training.lr": 0.1}),
        trial(3, "strong", 5, 0.3, k=4.0, **{"training.lr": 0.1}),
        trial(4, "strong k=4 fast", 5, 0.9, k=4.0, **{"training.lr": 0.2}),
    )
    found = runs["difference"]
    assert found["strong k=8"] == pytest.approx(-0.1)
    assert found["strong"] == pytest.approx(0.1)
    assert found[["base", "base k=8", "strong k=4 fast"]].isna().all()


def test_a_sparsity_that_no_run_has_is_equal_to_itself():
    runs = table(trial(0, "base", 5, 0.2, k=np.nan), trial(1, "strong", 5, 0.3, k=np.nan))
    assert runs.loc["strong", "difference"] == pytest.approx(0.1)
