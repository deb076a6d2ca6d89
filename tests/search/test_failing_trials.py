"""Trials that crash: recorded with their reason, told to the sampler, and the search goes on."""

from __future__ import annotations

import json

import optuna
import pandas as pd
import pytest
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from rich.console import Console
from sae_lens import SAE

from raysae.config import find_space, load_config
from raysae.search.run import resolve, run_search

pytestmark = pytest.mark.search


def test_a_diverging_trial_does_not_stop_the_others(tmp_path):
    overrides = {
        "training.tokens": 6_400,
        "training.batch_size": 64,  # so few steps that each has a row of the curve
        "search.num_samples": 4,
        "search.seeds_per_trial": 1,
        "search.seed": 6,
        "search.scheduler.name": "none",
        "confirm.top": 0,
        "resources.workers": 1,
        "space.training": {"lr": [1.0e-3, 1.0e30]},
    }
    config = resolve(load_config(find_space("orth.yaml"), overrides))
    out = tmp_path / "run"
    out.mkdir()
    outcome = run_search(config, out, Console(quiet=True))
    trials = pd.read_parquet(out / "trials.parquet")
    specs = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
    rates = {r["trial"]: r["spec"]["training"]["lr"] for r in specs if r["event"] == "end"}
    diverged = {number for number, rate in rates.items() if rate == 1.0e30}
    assert 0 < len(diverged) < 4, "the seed must choose both learning rates"
    assert outcome.failed == len(diverged)
    failed = trials[trials["state"] == "failed"]
    assert set(failed["trial"]) == diverged
    assert failed["error"].str.match(r"TrainingDivergedError: loss is \S+ at step \d+ of 100").all()
    assert (failed["score"] == 0.0).all()
    for number in diverged:
        folder = out / "trials" / f"{number:04d}"
        assert "TrainingDivergedError" in (folder / "error.log").read_text()
        kept = SAE.load_from_disk(folder / "last_good_sae").state_dict()
        assert all(torch.isfinite(tensor).all() for tensor in kept.values())
    finished = trials[trials["state"] == "finished"]
    assert (finished["training_steps"] == 100).all()
    storage = JournalStorage(JournalFileBackend(str(out / "optuna.journal")))
    study = optuna.load_study(study_name="raysae", storage=storage)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 4
    told = {trial.number: trial.value for trial in study.trials}
    assert {number: told[number] for number in diverged} == dict.fromkeys(diverged, 0.0)
    assert all(
        told[number] == score
        for number, score in zip(finished["trial"], finished["score"], strict=True)
    )
