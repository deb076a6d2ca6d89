"""Rank correlations against scipy and statsmodels; what is compared with what."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy.stats import pearsonr, rankdata, spearmanr

from raysae.analysis import predictors
from raysae.analysis.predictors import (
    ASSOCIATION_COLUMNS,
    COVARIATES,
    MIN_TRIALS,
    OUTCOMES,
    PREDICTORS,
    SENSITIVITY,
    Resampled,
    associations_table,
    rank_correlations,
    rungs_table,
)
from raysae.analysis.statistics import rank_interval


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictors, "RESAMPLES", 300)


def made_up(n: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three predictors, an outcome, three covariates; with ties."""
    rng = np.random.default_rng(seed)
    covariates = np.column_stack([rng.integers(3, 9, n), rng.random(n), rng.integers(0, 4, n)])
    x = rng.standard_normal((n, 3)) + covariates[:, [0]] * [0.4, 0.0, 0.1]
    outcome = np.round(x[:, 0] + covariates[:, 0] + rng.standard_normal(n), 1)
    return x, outcome, covariates


def by_statsmodels(x: np.ndarray, y: np.ndarray, covariates: np.ndarray) -> float:
    design = sm.add_constant(rankdata(covariates, axis=0))
    residuals = [sm.OLS(rankdata(v), design).fit().resid for v in (x, y)]
    return float(pearsonr(*residuals)[0])


@pytest.mark.parametrize("seed", range(3))
def test_rank_correlations_are_those_of_scipy_and_statsmodels(seed: int):
    x, y, covariates = made_up(seed=seed)
    plain, partial = rank_correlations(x, y, covariates)
    for i in range(3):
        assert plain[i] == pytest.approx(spearmanr(x[:, i], y)[0], abs=1e-12)
        assert partial[i] == pytest.approx(by_statsmodels(x[:, i], y, covariates), abs=1e-10)


def test_what_the_covariates_explain_alone_leaves_nothing():
    """A predictor and an outcome that both only follow L0."""
    _, _, covariates = made_up()
    l0 = covariates[:, 0]
    plain, partial = rank_correlations(np.column_stack([l0**2]), -l0, covariates)
    assert plain[0] == pytest.approx(-1)
    assert np.isnan(partial[0])


def test_constant_columns_have_no_correlation_and_constant_covariates_change_nothing():
    x, y, covariates = made_up()
    plain, partial = rank_correlations(np.column_stack([x[:, 0], np.ones(len(y))]), y, covariates)
    assert np.isnan(plain[1])
    assert np.isnan(partial[1])
    _, same = rank_correlations(x, y, np.column_stack([covariates, np.full(len(y), 3.0)]))
    _, before = rank_correlations(x, y, covariates)
    np.testing.assert_allclose(same, before)
    assert np.isnan(rank_correlations(x, np.ones(len(y)), covariates)[0]).all()


@pytest.mark.parametrize("ties", [False, True])
def test_a_resample_has_the_correlations_of_the_rows_it_repeats(ties: bool):
    rng = np.random.default_rng(3)
    x, y, covariates = rng.normal(size=(40, 4)), rng.normal(size=40), rng.normal(size=(40, 2))
    if ties:
        x, y = x.round(0), y.round(0)
    sample = Resampled(x, y, covariates)
    for _ in range(5):
        times = rng.multinomial(40, np.full(40, 1 / 40))
        rows = np.repeat(np.arange(40), times)
        expected = rank_correlations(x[rows], y[rows], covariates[rows])
        for found, wanted in zip(sample.correlations(times), expected, strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-10)


def test_rank_interval_is_scipys_correlation_and_about_its_bootstrap():
    x, y, _ = made_up(60)
    rho, low, high = rank_interval(x[:, 0], y)
    assert rho == pytest.approx(spearmanr(x[:, 0], y)[0])
    assert low < rho < high
    rng = np.random.default_rng(9)
    draws = [spearmanr(x[rows, 0], y[rows])[0] for rows in rng.integers(60, size=(800, 60))]
    np.testing.assert_allclose((low, high), np.quantile(draws, (0.025, 0.975)), atol=0.06)
    assert np.isnan(rank_interval([1, 2, 3], [3, 1, 2])[1])
    assert np.isnan(rank_interval(np.ones(20), np.arange(20))[0])


def test_pairs_of_one_witness_are_resampled_together():
    """Three seeds of each configuration: the interval is that of the configurations, not of three
    times as many pairs."""
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(2, 24))
    alone = rank_interval(x, y)
    copied = rank_interval(np.repeat(x, 3), np.repeat(y, 3), np.repeat(np.arange(24), 3))
    np.testing.assert_allclose(copied, alone)
    taken_for_72 = rank_interval(np.repeat(x, 3), np.repeat(y, 3))
    assert taken_for_72[2] - taken_for_72[1] < 0.7 * (alone[2] - alone[1])
    names = np.array([f"c{i}" for i in rng.permutation(24)])
    width = np.diff(rank_interval(x, y, names)[1:])
    assert width == pytest.approx(alone[2] - alone[1], abs=0.1)
    few = rank_interval(np.repeat(x[:7], 3), np.repeat(y[:7], 3), np.repeat(np.arange(7), 3))
    assert np.isfinite(few[0])
    assert np.isnan(few[1])


def rungs(n: int, strength: float, *, step: int = 100, copies: int = 1) -> pd.DataFrame:
    """A rungs table in which κ decides the score with `strength`, and nothing else does."""
    rng = np.random.default_rng(1)
    kappa = np.repeat(rng.random(n // copies), copies)
    frame = pd.DataFrame(
        {name: rng.random(n) for name in (*PREDICTORS, *COVARIATES)}
        | {"trial": range(n), "step": step}
        | dict.fromkeys(SENSITIVITY, kappa)
    )
    frame["configuration"] = np.repeat([f"c{i}" for i in range(n // copies)], copies)
    score = strength * kappa + (1 - strength) * rng.random(n)
    return frame.assign(**dict.fromkeys(OUTCOMES, score))


def test_a_predictor_that_decides_the_score_is_found_and_no_other(monkeypatch):
    monkeypatch.setattr(predictors, "RESAMPLES", 1000)  # the tails are asked
    table = associations_table(rungs(60, 0.8))
    assert list(table.columns) == list(ASSOCIATION_COLUMNS)
    assert list(table.loc[table["evidence"], "predictor"]) == list(SENSITIVITY)
    row = table.set_index("predictor").loc["condition_number"]
    assert row["partial_low"] <= row["partial"] <= row["partial_high"]
    assert (row["trials"], row["configurations"]) == (60, 60)


def test_nothing_is_found_where_nothing_is():
    assert not associations_table(rungs(60, 0.0))["evidence"].any()


def test_seeds_of_one_configuration_are_resampled_together():
    """Six copies of ten configurations are ten witnesses: the interval must be wide."""
    alone = associations_table(rungs(60, 0.5)).set_index("predictor").loc["condition_number"]
    copied = associations_table(rungs(60, 0.5, copies=6))
    copied = copied.set_index("predictor").loc["condition_number"]
    assert copied["configurations"] == 10
    width = copied["rho_high"] - copied["rho_low"]
    assert not width < alone["rho_high"] - alone["rho_low"]


def noise(rng: np.random.Generator, configurations: int, seeds: int) -> pd.DataFrame:
    """A rungs table in which every figure is that of its configuration and a seed's own, and none
    has to do with another."""
    names = [*PREDICTORS, *COVARIATES, "score"]
    n = configurations * seeds
    shared = np.repeat(rng.normal(size=(configurations, len(names))), seeds, axis=0)
    frame = pd.DataFrame(shared + 0.5 * rng.normal(size=(n, len(names))), columns=names)
    frame = frame.assign(trial=range(n), step=100, saebench_score=frame["score"])
    return frame.assign(configuration=np.repeat(range(configurations), seeds))


@pytest.mark.parametrize(("configurations", "seeds"), [(3, 5), (4, 4), (9, 3), (12, 2)])
def test_of_noise_evidence_is_seldom_found(configurations: int, seeds: int):
    """With three configurations chance alone makes up evidence in half of the runs, if asked."""
    rng = np.random.default_rng(0)
    runs = 15
    found = sum(
        bool(associations_table(noise(rng, configurations, seeds))["evidence"].any())
        for _ in range(runs)
    )
    assert found <= 2


def test_a_step_needs_ten_configurations_whatever_the_number_of_seeds():
    assert associations_table(rungs(45, 0.5, copies=5)).empty
    assert not associations_table(rungs(50, 0.5, copies=5)).empty


def test_steps_are_apart_and_those_with_few_trials_are_left_out():
    both = pd.concat([rungs(20, 0.5), rungs(MIN_TRIALS - 1, 0.5, step=200)])
    assert set(associations_table(both)["step"]) == {100}
    sparse = rungs(20, 0.5)
    sparse.loc[5:, "adjusted_rand_index"] = np.nan
    found = associations_table(sparse)["predictor"]
    assert "adjusted_rand_index" not in set(found)
    assert "condition_number" in set(found)
    assert associations_table(rungs_table([])).empty


def test_a_predictor_that_is_the_same_for_nearly_all_is_left_out():
    """Of 20 SAEs 16 at the bound say what the four others are like, 15 more than that."""
    saturated = rungs(20, 0.5)
    for equal, left_out in ((16, True), (15, False)):
        saturated["forget_retain_overlap"] = [1 - 1e-9] * equal + list(
            np.linspace(0, 0.9, 20 - equal)
        )
        asked = set(associations_table(saturated)["predictor"])
        assert ("forget_retain_overlap" not in asked) == left_out
        assert "condition_number" in asked


def test_where_not_all_were_asked_all_questions_the_half_that_the_search_sees_is_compared():
    """Half of them at one step: κ decides the score of their half, and chance what is left."""
    early, late = rungs(40, 0.9), rungs(40, 0.9, step=200)
    early["saebench_score"] = early["saebench_score"].sample(frac=1, random_state=0).to_numpy()
    early.loc[20:, "saebench_score"] = np.nan
    late["score"] = late["score"].sample(frac=1, random_state=0).to_numpy()
    found = associations_table(pd.concat([early, late]))
    assert dict(zip(found["step"], found["outcome"], strict=True)) == {
        100: "score",
        200: "saebench_score",
    }
    rho = found[found["predictor"] == "condition_number"]["rho"]
    assert (rho > 0.9).all()


def test_rungs_have_scores_figures_and_size_matched_ratios(make_spec):
    def row(group: str, kappa: float | None, random: float | None) -> dict[str, Any]:
        return {
            "trial": 0, "step": 8, "group": group, "condition_number": kappa,
            "random_condition_number_p50": random,
        }  # fmt: skip

    record = {
        "event": "rung", "trial": 0, "step": 8, "score": 0.1, "heldout_score": 0.2,
        "saebench_score": 0.3, "metrics": {"l0": 4.0},
        "conditioning": [row("all", 5.0, 2.0), row("forget", 6.0, 2.0), row("retain", None, None)],
    }  # fmt: skip
    specs = [make_spec(number=i, seed=i, rungs=(512, 24 * 64)) for i in (0, 1)]
    ends = [{"event": "end", "trial": s.number, "spec": s.to_dict()} for s in specs]
    # Trained again by the confirmation, which scores the end alone.
    again = make_spec(number=2, seed=9, run="trial 0", stage="confirmation")
    again = again.model_copy(update={"seeds": 5})
    ends.append({"event": "end", "trial": 2, "spec": again.to_dict()})
    table = rungs_table([record | {"trial": i} for i in range(3)] + ends)
    first = table.iloc[0]
    assert (first["condition_number"], first["forget_condition"]) == (5.0, 3.0)
    assert np.isnan(first["retain_condition"])
    assert (first["l0"], first["saebench_score"]) == (4.0, 0.3)
    assert table["configuration"].nunique() == 1  # other seeds of the same
