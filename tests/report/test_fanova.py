"""fANOVA importances against Optuna's own, and how often chance is called a finding."""

from __future__ import annotations

from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from raysae.report import fanova

METHODS = [f"method {i}" for i in range(10)]
SPACE: dict[str, BaseDistribution] = {
    "regularizer": CategoricalDistribution(METHODS),
    "alpha": FloatDistribution(0.01, 30, log=True),
    "alpha_schedule": CategoricalDistribution(list("abcde")),
    "k": IntDistribution(3, 16, log=True),
}


def drawn(rng: np.random.Generator, n: int) -> list[Any]:
    """Trials of a search at random, all of score 0."""
    return [
        optuna.trial.create_trial(
            value=0.0,
            params={
                "regularizer": METHODS[rng.integers(10)],
                "alpha": float(np.exp(rng.uniform(np.log(0.01), np.log(30)))),
                "alpha_schedule": "abcde"[rng.integers(5)],
                "k": int(rng.integers(3, 17)),
            },
            distributions=SPACE,
        )
        for _ in range(n)
    ]


@pytest.mark.parametrize("n", [12, 60])
def test_importances_are_optunas(n: int):
    rng = np.random.default_rng(n)
    trials, values = drawn(rng, n), rng.normal(size=n)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()
    for trial, value in zip(trials, values, strict=True):
        study.add_trial(
            optuna.trial.create_trial(
                value=float(value), params=trial.params, distributions=trial.distributions
            )
        )
    evaluator = optuna.importance.FanovaImportanceEvaluator(
        n_trees=fanova.TREES, max_depth=fanova.DEPTH, seed=0
    )
    expected = optuna.importance.get_param_importances(study, evaluator=evaluator)
    assert fanova.importances(trials, values, list(SPACE)).measured == pytest.approx(expected)


def test_of_scores_of_chance_seldom_any_parameter_is_named(monkeypatch: pytest.MonkeyPatch):
    """Against the largest of five shuffles, each parameter by itself, two of three are."""
    monkeypatch.setattr(fanova, "SHUFFLES", 19)
    monkeypatch.setattr(fanova, "TREES", 3)
    rng = np.random.default_rng(0)
    searches = 40
    named = 0
    for _ in range(searches):
        found = fanova.importances(drawn(rng, 22), rng.normal(size=22), list(SPACE))
        named += bool(found.above)
    assert named <= 5  # of 2 expected


def test_what_decides_the_score_is_named_and_nothing_else():
    rng = np.random.default_rng(1)
    trials = drawn(rng, 24)
    values = np.array([-0.02 * trial.params["k"] for trial in trials])
    found = fanova.importances(trials, values + 0.02 * rng.normal(size=24), list(SPACE))
    assert found.above == ["k"]
    assert sum(found.measured.values()) == pytest.approx(1)


def test_trials_that_are_all_alike_have_no_importances():
    trials = drawn(np.random.default_rng(2), 1) * 12
    found = fanova.importances(trials, np.arange(12.0), list(SPACE))
    assert set(found.measured.values()) == {0.0}
    assert not found.above
