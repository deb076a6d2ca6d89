"""One whole search through Ray, made once for all tests that look at it; a method to confirm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from observed import Seen, observe

from raysae.training.spec import TrialSpec

LOOKS_AT_WANDB = "weights_and_biases"
"""In the name of a test."""


@pytest.fixture(scope="session")
def seen(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Seen:
    """A smoke search with all that it leaves out by default; its folder is not to be changed.

    Weights & Biases takes a process a trial, and is left out where no test looks at it.
    """
    options = [
        "--smoke",
        *("--set", "search.seeds_per_trial=2"),
        *("--set", "training.tokens=65536"),
        *("--set", "confirm.top=1"),
        *("--set", "confirm.seeds=2"),
        *("--set", "evals=[unlearning, sparse_probing]"),
    ]
    if any(LOOKS_AT_WANDB in item.name for item in request.session.items):
        options += ["--set", "loggers=[wandb]"]
    return observe(tmp_path_factory.mktemp("search") / "run", *options)


@pytest.fixture
def grouped(make_spec) -> Callable[..., TrialSpec]:
    """A trial with the method `grouped`; keywords as for `make_spec`."""

    def make(number: int, **kwargs: Any) -> TrialSpec:
        parameters = {"group_update_period": 7, "n_groups": 3}
        return make_spec(regularizer="grouped", parameters=parameters, number=number, **kwargs)

    return make
