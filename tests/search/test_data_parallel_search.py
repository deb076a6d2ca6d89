"""Trials on two workers each, through the pool."""

from __future__ import annotations

import pandas as pd
import pytest
from observed import beyond_this_machine, observe

pytestmark = pytest.mark.search


def test_two_workers_train_one_trial_together(tmp_path):
    settings = [
        "training.tokens=8192",
        "training.batch_size=64",
        "training.lr=4.0e-3",
        # Dense features, none of which is eligible: nobody looks at the score, which takes longest.
        "sae={architecture: topk, d_sae: 256, k: 32}",
        "space.sae={}",
        "space.regularizer={none: , fixed_orthogonal: }",
        "search.num_samples=2",
        "search.seeds_per_trial=2",
        "search.scheduler.name=none",
        "confirm.top=0",
        "resources.workers=2",
        "resources.workers_per_trial=2",
    ]
    options = [option for setting in settings for option in ("--set", setting)]
    seen = observe(tmp_path / "run", "--space", "orth.yaml", *options)
    trials = pd.read_parquet(tmp_path / "run" / "trials.parquet")
    assert list(trials["state"]) == ["finished"] * 2
    assert (trials["training_steps"] == 128).all()
    assert (trials["explained_variance"] > 0.5).all()
    # The workers too, which talk to each other.
    assert beyond_this_machine(seen) == {}
