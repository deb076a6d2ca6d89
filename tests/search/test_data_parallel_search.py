"""Trials on two workers each, through the pool."""

from __future__ import annotations

import pandas as pd
import pytest
from rich.console import Console

from raysae.config import find_space, load_config
from raysae.search.run import resolve, run_search

pytestmark = pytest.mark.search


def test_two_workers_train_one_trial_together(tmp_path):
    overrides = {
        "training.tokens": 32_768,
        "training.batch_size": 64,
        "search.num_samples": 2,
        "search.seeds_per_trial": 2,
        "search.scheduler.name": "none",
        "confirm.top": 0,
        "resources.workers": 2,
        "resources.workers_per_trial": 2,
    }
    config = resolve(load_config(find_space("orth.yaml"), overrides))
    out = tmp_path / "run"
    out.mkdir()
    outcome = run_search(config, out, Console(quiet=True))
    assert (outcome.trials, outcome.failed) == (2, 0), outcome.first_error
    trials = pd.read_parquet(out / "trials.parquet")
    assert (trials["training_steps"] == 512).all()
    assert (trials["explained_variance"] > 0.5).all()
