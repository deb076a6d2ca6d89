"""Methods with parameters that make them act within a few steps, pairs that cannot be, and short
ways to train."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from raysae.regularizers import REGISTRY
from raysae.training.loop import train_one
from raysae.training.run import Progress, Rung, SAERun
from raysae.training.spec import SPARSITY_FIELD

ARCHITECTURES = sorted(SPARSITY_FIELD)
METHODS = sorted(REGISTRY)
REFUSED = {("gradient_disentangled", "matryoshka_batchtopk")}
"""(regularizer, architecture) pairs that `check` refuses."""

PAIRS = [
    (regularizer, architecture)
    for regularizer in METHODS
    for architecture in ARCHITECTURES
    if (regularizer, architecture) not in REFUSED
]
"""(regularizer, architecture) pairs that it accepts."""

PICKS_OVER_A_BATCH = {"batchtopk", "matryoshka_batchtopk"}
"""Architectures whose active features depend on the rest of the batch in training."""

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
every_method = pytest.mark.parametrize("regularizer", METHODS)
every_penalty = pytest.mark.parametrize(
    "regularizer", [name for name in METHODS if REGISTRY[name].uses_alpha]
)

SMALL = {
    "group_update_period": 5,
    "n_groups": 4,
    "n_super_groups": 2,
    "subspace_rank": 2,
    "chunk_size": 12,
    "observe_every": 3,
}


def small(regularizer: str) -> dict[str, Any]:
    """The method's parameters for d_sae = 32 and two dozen steps."""
    return {k: v for k, v in SMALL.items() if k in REGISTRY[regularizer].model_fields}


def advance(run: SAERun, steps: int) -> list[dict[str, float]]:
    """Losses of that many of SAELens' own steps."""
    return [{name: v.item() for name, v in run.advance().items()} for _ in range(steps)]


def train(run: SAERun, fake_result: Any, on_event: Any = None) -> list[Progress | Rung]:
    """All events of the run, trained until `on_event` says False."""
    events: list[Progress | Rung] = []

    def listen(event: Progress | Rung) -> bool:
        events.append(event)
        return on_event is None or on_event(event)

    train_one(run, lambda *_: fake_result(), listen)
    return events


def progress(events: list[Progress | Rung]) -> list[Progress]:
    return [event for event in events if isinstance(event, Progress)]


def rungs(events: list[Progress | Rung]) -> list[Rung]:
    return [event for event in events if isinstance(event, Rung)]


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Every leaf of nested dictionaries, lists and tuples, by its path."""
    if isinstance(value, dict):
        items: Any = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        return {path: value}
    return {k: v for key, item in items for k, v in flatten(item, f"{path}/{key}").items()}


def assert_same_state(first: SAERun, second: SAERun) -> None:
    """Bit for bit equal in everything that decides the rest of the run."""
    a, b = flatten(first.state_dict()), flatten(second.state_dict())
    assert a.keys() == b.keys()
    for name in a.keys() - {"/train_seconds"}:
        value = a[name]
        same = torch.equal(value, b[name]) if torch.is_tensor(value) else value == b[name]
        assert same, name


def doubled(run: SAERun) -> SAERun:
    """The run in float64, in which rounding stays out of the way over a whole training."""
    run.sae.double()
    run.sae.cfg.dtype = "float64"
    run.sae.dtype = torch.float64
    for name, tensor in run.regularizer_state.items():
        if tensor.is_floating_point():
            run.regularizer_state[name] = tensor.double()
    for name, tensor in vars(run.firing).items():
        setattr(run.firing, name, tensor.double())

    class Source:
        def __getattr__(self, name: str) -> Any:
            return getattr(run_source, name)

        def batch(self, *args: Any) -> Any:
            rows, labels = run_source.batch(*args)
            return rows.double(), labels

        def batches(self, *args: Any) -> Any:
            rows, labels = run_source.batches(*args)
            return rows.double(), labels

    run_source, run.source = run.source, Source()
    return run
