"""A trial from start to end: resuming, rungs, curves, and what must not leak in or out."""

from __future__ import annotations

import io
import math
import random
from typing import Any

import numpy as np
import pytest
import torch

from raysae.regularizers import REGISTRY
from raysae.training.loop import Progress, Rung, TrainingDivergedError, TrialRun
from raysae.training.spec import SPARSITY_FIELD

ARCHITECTURES = sorted(SPARSITY_FIELD)
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
every_method = pytest.mark.parametrize("regularizer", sorted(REGISTRY))


def small(regularizer: str) -> dict[str, Any]:
    """Parameters that make a method act within 24 steps."""
    fields = REGISTRY[regularizer].model_fields
    return {k: v for k, v in {"group_update_period": 5, "n_groups": 4}.items() if k in fields}


def advance(run: TrialRun, steps: int) -> list[dict[str, float]]:
    return [{name: v.item() for name, v in run.advance().items()} for _ in range(steps)]


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Every leaf of nested dictionaries, lists and tuples, by its path."""
    if isinstance(value, dict):
        items: Any = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        return {path: value}
    return {k: v for key, item in items for k, v in flatten(item, f"{path}/{key}").items()}


def assert_same_state(first: TrialRun, second: TrialRun) -> None:
    """Bit for bit equal in everything that decides the rest of the run."""
    a, b = flatten(first.state_dict()), flatten(second.state_dict())
    assert a.keys() == b.keys()
    for name, value in a.items():
        same = torch.equal(value, b[name]) if torch.is_tensor(value) else value == b[name]
        assert same, name


def train(run: TrialRun, fake_result: Any, on_event: Any = None) -> list[Progress | Rung]:
    events: list[Progress | Rung] = []

    def listen(event: Progress | Rung) -> bool:
        events.append(event)
        return on_event is None or on_event(event)

    run.train(lambda *_: fake_result(), listen)
    return events


def progress(events: list[Progress | Rung]) -> list[Progress]:
    return [event for event in events if isinstance(event, Progress)]


def rungs(events: list[Progress | Rung]) -> list[Rung]:
    return [event for event in events if isinstance(event, Rung)]


# --- Repeatable, and resumable --------------------------------------------------------------------


@every_architecture
@every_method
@pytest.mark.parametrize("through_disk", [False, True], ids=["memory", "disk"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    architecture: str, regularizer: str, through_disk: bool, make_spec, make_store
):
    spec = make_spec(
        architecture, regularizer, small(regularizer), schedule="cosine", dead_after=3, lr=5e-3
    )
    store = make_store()
    whole = TrialRun(spec, store)
    losses = advance(whole, 24)

    interrupted = TrialRun(spec, store)
    advance(interrupted, 13)
    state = interrupted.state_dict()
    if through_disk:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    resumed = TrialRun(spec, store)
    resumed.load_state_dict(state)
    assert (resumed.step, resumed.tokens) == (13, 13 * 64)
    assert advance(resumed, 11) == losses[13:]
    assert_same_state(resumed, whole)


def test_loading_a_state_leaves_the_run_it_came_from_alone(make_spec, make_store):
    spec, store = make_spec(regularizer="grouped", parameters=small("grouped")), make_store()
    expected = advance(TrialRun(spec, store), 24)
    first, second = TrialRun(spec, store), TrialRun(spec, store)
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
    run, saved = TrialRun(spec, store), io.BytesIO()

    def save(event: Progress | Rung) -> bool:
        if event.step == 8 and isinstance(event, Rung) == (at == "rung"):
            torch.save(run.state_dict(), saved)
        return True

    expected = [event for event in train(run, fake_result, save) if event.step > 8]
    saved.seek(0)
    resumed = TrialRun(spec, store)
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    events = train(resumed, fake_result)
    assert progress(events) == progress(expected)
    last, wanted = rungs(events)[-1], rungs(expected)[-1]
    for name, tensor in wanted.sae.state_dict().items():
        assert torch.equal(last.sae.state_dict()[name], tensor), name
    if at == "rung":
        assert torch.equal(last.forget_rate, wanted.forget_rate)
        assert torch.equal(last.retain_rate, wanted.retain_rate)


@every_architecture
@every_method
def test_the_same_spec_gives_the_same_numbers_twice(
    architecture: str, regularizer: str, make_spec, make_store
):
    spec = make_spec(architecture, regularizer, small(regularizer))
    first, second = TrialRun(spec, make_store()), TrialRun(spec, make_store())
    assert advance(first, 24) == advance(second, 24)
    assert_same_state(first, second)


def test_another_seed_gives_other_weights_and_other_batches(make_spec, make_store):
    store = make_store()
    first, second = (TrialRun(make_spec(seed=seed), store) for seed in (1, 2))
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
        run = TrialRun(make_spec("topk", regularizer, small(regularizer)), make_store())
        losses = advance(run, 24)
        assert torch.equal(torch.get_rng_state(), states[0])
        assert np.array_equal(np.random.get_state()[1], states[1])
        assert random.getstate() == states[2]
        return losses

    assert losses_with(0) == losses_with(1)


# --- Rungs, and when to stop ----------------------------------------------------------------------


def test_the_sae_is_scored_at_the_rungs_asked_for_and_at_the_end(
    make_spec, make_store, fake_result
):
    run = TrialRun(make_spec(rungs=(8 * 64, 16 * 64, 24 * 64)), make_store())
    scored: list[int] = []

    def evaluate(_: Any, steps: int) -> Any:
        scored.append(steps)
        return fake_result(score=steps / 100)

    events: list[Progress | Rung] = []
    run.train(evaluate, lambda event: events.append(event) or True)
    found = rungs(events)
    assert scored == [r.step for r in found] == [8, 16, 24]
    assert [r.tokens for r in found] == [512, 1024, 1536]
    assert [r.last for r in found] == [False, False, True]
    assert [r.result.score for r in found] == [0.08, 0.16, 0.24]


def test_a_rung_inside_a_step_is_scored_after_that_step(make_spec, make_store, fake_result):
    run = TrialRun(make_spec(rungs=(8 * 64 + 1, 24 * 64)), make_store())
    assert [r.step for r in rungs(train(run, fake_result))] == [9, 24]


def test_rates_at_a_rung_are_those_since_the_last_rung(make_spec, make_store, fake_result):
    spec, store = make_spec(rungs=(8 * 64, 24 * 64)), make_store()
    found = rungs(train(TrialRun(spec, store), fake_result))
    again = TrialRun(spec, store)
    for rung, steps in zip(found, (8, 16), strict=True):
        fired = torch.zeros(2, 32)
        tokens = torch.zeros(2)
        for _ in range(steps):
            batch, is_forget = store.batch(spec.seed, again.step, 64)
            with torch.no_grad():
                active = (again.sae.encode(batch) > 0).float()
            fired += torch.stack([active[is_forget].sum(0), active[~is_forget].sum(0)])
            tokens += torch.tensor([is_forget.sum(), (~is_forget).sum()])
            again.advance()
        torch.testing.assert_close(rung.forget_rate, fired[0] / tokens[0])
        torch.testing.assert_close(rung.retain_rate, fired[1] / tokens[1])


def test_a_rung_is_a_snapshot_that_further_training_leaves_alone(
    make_spec, make_store, fake_result
):
    spec = make_spec(
        regularizer="grouped", parameters=small("grouped"), rungs=(8 * 64, 24 * 64), lr=5e-3
    )
    copies: list[dict[str, Any]] = []

    def contents(rung: Rung) -> dict[str, Any]:
        rest = {"forget": rung.forget_rate, "retain": rung.retain_rate, "groups": rung.groups}
        return rest | rung.sae.state_dict() | rung.metrics

    def copy(event: Progress | Rung) -> bool:
        if isinstance(event, Rung):
            copies.append(
                {k: v.clone() if torch.is_tensor(v) else v for k, v in contents(event).items()}
            )
        return True

    found = rungs(train(TrialRun(spec, make_store()), fake_result, copy))
    for rung, kept in zip(found, copies, strict=True):
        for name, value in contents(rung).items():
            assert torch.equal(value, kept[name]) if torch.is_tensor(value) else value == kept[name]
    assert not torch.equal(found[0].sae.W_dec, found[1].sae.W_dec)


def test_groups_are_reported_by_methods_that_have_them_only(make_spec, make_store, fake_result):
    for regularizer in REGISTRY:
        run = TrialRun(make_spec("topk", regularizer, small(regularizer)), make_store())
        groups = rungs(train(run, fake_result))[-1].groups
        assert (groups is not None) == ("groups" in run.regularizer_state)


@pytest.mark.parametrize("kind", [Progress, Rung])
def test_false_from_the_listener_ends_the_trial_there(
    kind: type, make_spec, make_store, fake_result
):
    run = TrialRun(make_spec(rungs=(10 * 64, 24 * 64)), make_store())
    events = train(run, fake_result, lambda e: not (isinstance(e, kind) and e.step == 10))
    assert run.step == 10
    assert isinstance(events[-1], kind)


def test_a_trial_of_one_step_is_scored(make_spec, make_store, fake_result):
    events = train(TrialRun(make_spec(steps=1), make_store()), fake_result)
    assert [type(event) for event in events] == [Progress, Rung]


def test_a_method_that_does_not_fit_the_run_is_refused_before_training(make_spec, make_store):
    spec = make_spec(regularizer="grouped", parameters={"group_update_period": 25})
    with pytest.raises(ValueError, match="longer than the run"):
        TrialRun(spec, make_store())


# --- Curves ---------------------------------------------------------------------------------------


@every_architecture
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_activations_that_are_not_finite_are_an_error_that_names_the_step(
    architecture: str, bad: float, make_spec, make_store, fake_result
):
    store = make_store()
    for chunk in store._chunks:
        chunk[::7] = bad
    run = TrialRun(make_spec(architecture), store)
    with pytest.raises(TrainingDivergedError, match=r"loss is (nan|inf) at step 1 of 24"):
        train(run, fake_result)


@every_architecture
def test_the_loss_falls_on_a_learnable_problem(
    architecture: str, make_spec, make_store, fake_result
):
    run = TrialRun(make_spec(architecture, steps=300, lr=5e-3, sparsity=None), make_store())
    rows = progress(train(run, fake_result))
    first, last = rows[0].metrics, rows[-1].metrics
    assert last["l2_loss"] < 0.5 * first["l2_loss"]
    assert last["explained_variance"] > first["explained_variance"]


def test_a_short_run_logs_every_step_and_a_long_one_about_64_times(
    make_spec, make_store, fake_result
):
    short = progress(train(TrialRun(make_spec(steps=20), make_store()), fake_result))
    assert [row.step for row in short] == list(range(1, 21))
    long = progress(train(TrialRun(make_spec(steps=200, batch_size=8), make_store()), fake_result))
    assert [row.step for row in long] == [*range(3, 200, 3), 200]
    assert [row.tokens for row in long] == [row.step * 8 for row in long]


def test_a_curve_row_is_the_mean_over_the_steps_since_the_last_one(
    make_spec, make_store, fake_result
):
    spec = make_spec(steps=200, batch_size=8, regularizer="fixed_orthogonal")
    rows = progress(train(TrialRun(spec, make_store()), fake_result))
    losses = advance(TrialRun(spec, make_store()), 200)
    start = 0
    for row in rows:
        steps = losses[start : row.step]
        for metric, loss in (("loss", "loss"), ("l2_loss", "mse_loss"), ("penalty", "penalty")):
            mean = sum(step[loss] for step in steps) / len(steps)
            assert row.metrics[metric] == pytest.approx(mean, rel=1e-5)
        start = row.step


@every_architecture
def test_explained_variance_l0_and_losses_equal_a_direct_computation(
    architecture: str, make_spec, make_store, fake_result
):
    spec, store = make_spec(architecture, steps=12), make_store()
    rows = progress(train(TrialRun(spec, store), fake_result))
    every_row = torch.cat([torch.from_numpy(chunk) for chunk in store._chunks]).double()
    every_row *= store.scale
    variance = (every_row - every_row.mean(0)).pow(2).sum(1).mean()
    again = TrialRun(spec, store)
    for row in rows:
        x, _ = store.batch(spec.seed, again.step, 64)
        with torch.no_grad():
            acts = again.sae.encode(x)
            error = (x - again.sae.decode(acts)).double().pow(2).sum(1).mean()
        metrics = row.metrics
        expected = (1 - error / variance).item()
        assert metrics["explained_variance"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert metrics["l0"] == pytest.approx((acts > 0).sum(1).double().mean().item())
        assert metrics["l2_loss"] == pytest.approx(error.item(), rel=1e-4)
        l1 = 0.5 * acts.sum(1).mean().item() if architecture == "standard" else 0.0
        assert metrics["sparsity_loss"] == pytest.approx(l1, rel=1e-4)
        again.advance()


def test_alpha_follows_its_schedule(make_spec, make_store):
    spec = make_spec(regularizer="fixed_orthogonal", schedule="cosine", alpha=2.0, steps=21)
    run = TrialRun(spec, make_store())
    assert run.alpha == 2.0
    advance(run, 10)
    assert run.alpha == pytest.approx(1.0)
    advance(run, 10)
    assert run.alpha == pytest.approx(0.0, abs=1e-12)


def test_the_learning_rate_warms_up_and_decays_to_zero(make_spec, make_store):
    run = TrialRun(make_spec(steps=20, lr=0.01, lr_warmup=0.2, lr_decay=0.5), make_store())
    used = []
    for _ in range(20):
        used.append(run.optimizer.param_groups[0]["lr"])
        run.advance()
    assert used[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    assert used[4:10] == pytest.approx([0.01] * 6)
    assert used[10:] == pytest.approx([0.01 * (10 - i) / 10 for i in range(10)])
