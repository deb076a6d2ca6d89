"""Training again, or taken up from a state: the same numbers, bit for bit."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import torch
from training_bench import (
    ARCHITECTURES,
    METHODS,
    advance,
    assert_same_state,
    every_method,
    progress,
    rungs,
    small,
    train,
)

from raysae.training.loop import stepper
from raysae.training.run import Progress, Rung, SAERun
from raysae.training.schedules import Dynamic


def go(runs: list[SAERun], steps: int) -> list[dict[str, list[float]]]:
    """Losses of that many steps of the kind that the spec names, by name, one a run."""
    advance = stepper(runs)
    return [{name: v.tolist() for name, v in advance().items()} for _ in range(steps)]


@pytest.mark.parametrize("step", ["packed", "saelens"])
@pytest.mark.parametrize(
    ("architecture", "regularizer", "schedule"),
    [("topk", method, "cosine") for method in METHODS]
    + [(architecture, "cross_task_inhibition", "dynamic") for architecture in ARCHITECTURES],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    architecture: str, regularizer: str, schedule: str, step: str, make_spec, make_store
):
    """Two seeds, by SAELens' own step and as a pack, which is what trials are trained by."""
    spec = make_spec(
        architecture, regularizer, small(regularizer), step=step, schedule=schedule, dead_after=3,
        lr=5e-3,
    ).model_copy(update={"seeds": 2})  # fmt: skip
    if schedule == "dynamic":
        spec = spec.model_copy(update={"alpha_schedule": Dynamic(target=0.5, gain=0.2, every=4)})
    store = make_store()

    def begin() -> list[SAERun]:
        return [SAERun(member, store) for member in spec.members()]

    whole, interrupted, resumed = begin(), begin(), begin()
    losses = go(whole, 24)
    go(interrupted, 13)
    file = io.BytesIO()
    torch.save([run.state_dict() for run in interrupted], file)
    file.seek(0)
    for run, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        run.load_state_dict(state)
    for run, other in zip(resumed, interrupted, strict=True):
        assert (run.step, run.tokens) == (13, 13 * 64)
        assert_same_state(run, other)
    assert go(resumed, 11) == losses[13:]
    for run, other in zip(resumed, whole, strict=True):
        assert_same_state(run, other)


def test_loading_a_state_leaves_the_run_it_came_from_alone(make_spec, make_store):
    spec, store = make_spec(regularizer="grouped", parameters=small("grouped")), make_store()
    expected = advance(SAERun(spec, store), 24)
    first, second = SAERun(spec, store), SAERun(spec, store)
    advance(first, 13)
    second.load_state_dict(first.state_dict())
    assert advance(second, 11) == expected[13:]
    assert advance(first, 11) == expected[13:]


@pytest.mark.parametrize("at", ["progress", pytest.param("rung")])
def test_a_checkpoint_taken_at_an_event_gives_the_same_remaining_events(
    at: str, make_spec, make_store, fake_result
):
    spec = make_spec(regularizer="grouped", parameters=small("grouped"), rungs=(512, 1536))
    store = make_store()
    run, saved = SAERun(spec, store), io.BytesIO()

    def save(event: Progress | Rung) -> bool:
        if event.step == 8 and isinstance(event, Rung) == (at == "rung"):
            torch.save(run.state_dict(), saved)
        return True

    expected = [event for event in train(run, fake_result, save) if event.step > 8]
    saved.seek(0)
    resumed = SAERun(spec, store)
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    events = train(resumed, fake_result)
    assert progress(events) == progress(expected)
    last, wanted = rungs(events)[-1], rungs(expected)[-1]
    for name, tensor in wanted.sae.state_dict().items():
        assert torch.equal(last.sae.state_dict()[name], tensor), name
    if at == "rung":
        assert torch.equal(last.forget_rate, wanted.forget_rate)
        assert torch.equal(last.retain_rate, wanted.retain_rate)


@pytest.mark.parametrize(
    ("architecture", "regularizer"),
    [("topk", method) for method in METHODS]
    + [(architecture, "grouped") for architecture in ARCHITECTURES],
)
def test_the_same_spec_gives_the_same_numbers_twice(
    architecture: str, regularizer: str, make_spec, make_store
):
    spec = make_spec(architecture, regularizer, small(regularizer))
    first, second = SAERun(spec, make_store()), SAERun(spec, make_store())
    assert advance(first, 24) == advance(second, 24)
    assert_same_state(first, second)


def test_another_seed_gives_other_weights_and_other_batches(make_spec, make_store):
    store = make_store()
    first, second = (SAERun(make_spec(seed=seed), store) for seed in (1, 2))
    assert not torch.equal(first.sae.W_dec, second.sae.W_dec)
    assert advance(first, 1) != advance(second, 1)


@every_method
def test_training_neither_uses_nor_changes_global_random_states(
    regularizer: str, make_spec, make_store
):
    def losses_with(seed: int) -> list[dict[str, float]]:
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        run = SAERun(make_spec("topk", regularizer, small(regularizer)), make_store())
        losses = advance(run, 24)
        assert torch.equal(torch.get_rng_state(), states[0])
        assert np.array_equal(np.random.get_state()[1], states[1])
        assert random.getstate() == states[2]
        return losses

    assert losses_with(0) == losses_with(1)
