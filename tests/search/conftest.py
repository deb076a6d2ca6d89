"""One whole search through Ray, made once for all tests that look at it."""

from __future__ import annotations

import pytest
from observed import Seen, observe


@pytest.fixture(scope="session")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """A smoke search with all that it leaves out by default; its folder is not to be changed."""
    options = [
        "--smoke",
        *("--set", "search.seeds_per_trial=2"),
        *("--set", "training.tokens=65536"),
        *("--set", "confirm.top=1"),
        *("--set", "confirm.seeds=2"),
        *("--set", "evals=[unlearning, sparse_probing]"),
        *("--set", "loggers=[wandb]"),
    ]
    return observe(tmp_path_factory.mktemp("search") / "run", *options)
