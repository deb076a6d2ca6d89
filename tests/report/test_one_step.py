"""What is said of parameters is said of scores at one training step."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest
from optuna.distributions import FloatDistribution, IntDistribution

from raysae.analysis.seeds import seed_records
from raysae.report import optuna_figures
from raysae.report.run import read_run

SPACE = {"alpha": FloatDistribution(0.01, 30), "k": IntDistribution(3, 16)}


@pytest.fixture
def stopped() -> tuple[Any, optuna.Study]:
    """Scores are noise that rises with training, and trials of few features are stopped early."""
    rng = np.random.default_rng(2)
    study, rungs = optuna.create_study(direction="maximize"), []
    for number in range(30):
        params = {"alpha": float(rng.uniform(0.01, 30)), "k": int(rng.integers(3, 17))}
        early = rng.normal(0.2, 0.05)
        rungs.append({"trial": number, "step": 96, "objective": early})
        if params["k"] > 9:
            rungs.append({"trial": number, "step": 256, "objective": early + 0.3})
        study.add_trial(
            optuna.trial.create_trial(
                value=rungs[-1]["objective"],
                params=params,
                distributions=SPACE,
                user_attrs={"trial": number},
            )
        )
    return SimpleNamespace(rungs=pd.DataFrame(rungs), gaps=[]), study


def test_what_decides_who_is_stopped_does_not_seem_to_decide_the_score(stopped, tmp_path: Path):
    run, study = stopped
    last = optuna_figures.AtOneStep(0, study)  # each trial's last score, as the sampler was told
    assert "higher k (" in optuna_figures.slices(last).title
    assert "hung on: k (" in optuna_figures.importances(run, last, tmp_path).title
    at = optuna_figures.at_one_step(run, study)
    assert (at.step, len(at.study.trials)) == (96, 30)
    assert optuna_figures.slices(at).title == "By itself none of α, k shows a trend (step 96)"
    plot = optuna_figures.importances(run, at, tmp_path)
    assert plot.title == "No parameter is shown to matter for the score at step 96"
    assert "30 trials at step 96" in plot.caption


def test_of_noise_seldom_any_parameter_shows_a_trend():
    """Of eight by themselves one in three studies would."""
    rng = np.random.default_rng(0)
    names = [f"training.x{i}" for i in range(8)]
    found = 0
    for _ in range(20):
        trials = [
            SimpleNamespace(params=dict(zip(names, rng.random(8), strict=True)), value=rng.random())
            for _ in range(24)
        ]
        found += "Higher" in optuna_figures._trends(SimpleNamespace(trials=trials), names)
    assert found <= 3


def test_of_too_few_trials_nothing_is_said_of_importances(stopped, tmp_path: Path):
    run, study = stopped
    run.rungs = run.rungs[run.rungs["trial"] < optuna_figures.MIN_TRIALS - 1]
    at = optuna_figures.at_one_step(run, study)
    assert optuna_figures.importances(run, at, tmp_path) is None
    assert "Parameter importances need 10 trials" in run.gaps[0]
    run.rungs = run.rungs.iloc[:0]
    assert optuna_figures.at_one_step(run, study) is None
    assert optuna_figures.importances(run, None, tmp_path) is None


def test_the_scores_are_those_of_the_journal_at_that_step(search: Path):
    run = read_run(search)
    study = optuna_figures.load_study(run)
    at = optuna_figures.at_one_step(run, study)
    lines = (search / "journal.jsonl").read_text().splitlines()
    rungs = [r for r in map(json.loads, lines) if r["event"] == "rung" and r["step"] == at.step]
    told = {r["trial"]: np.mean([s["objective"] for s in seed_records(r)]) for r in rungs}
    found = {trial.user_attrs["trial"]: trial.value for trial in at.study.trials}
    assert len(found) == len(study.trials)
    assert found == pytest.approx({number: told[number] for number in found})
