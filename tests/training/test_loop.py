"""A trial from start to end: rungs, when to stop, divergence, curves."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import pytest
import torch
from training_bench import (
    METHODS,
    REFUSED,
    advance,
    every_architecture,
    every_method,
    progress,
    rungs,
    small,
    train,
)

from raysae.training.loop import train_one
from raysae.training.run import EXPLODED, Progress, Rung, SAERun, TrainingDivergedError
from raysae.training.saes import export_sae
from raysae.training.schedules import Dynamic
from raysae.training.spec import TrialSpec

# --- Rungs, and when to stop ----------------------------------------------------------------------


def test_the_sae_is_scored_at_the_rungs_asked_for_and_at_the_end(
    make_spec, make_store, fake_result
):
    run = SAERun(make_spec(rungs=(8 * 64, 16 * 64, 24 * 64)), make_store())
    scored: list[int] = []

    def evaluate(_: Any, steps: int) -> Any:
        scored.append(steps)
        return fake_result(score=steps / 100)

    events: list[Progress | Rung] = []
    train_one(run, evaluate, lambda event: events.append(event) or True)
    found = rungs(events)
    assert scored == [r.step for r in found] == [8, 16, 24]
    assert [r.tokens for r in found] == [512, 1024, 1536]
    assert [r.last for r in found] == [False, False, True]
    assert [r.result.score for r in found] == [0.08, 0.16, 0.24]


def test_a_rung_inside_a_step_is_scored_after_that_step(make_spec, make_store, fake_result):
    run = SAERun(make_spec(rungs=(8 * 64 + 1, 24 * 64)), make_store())
    assert [r.step for r in rungs(train(run, fake_result))] == [9, 24]


def test_rates_at_a_rung_are_those_of_the_second_half_of_the_way(
    make_spec, make_store, fake_result
):
    spec, store = make_spec(rungs=(8 * 64, 24 * 64)), make_store()
    found = rungs(train(SAERun(spec, store), fake_result))
    again = SAERun(spec, store)
    for rung, (unseen, steps) in zip(found, ((4, 4), (8, 8)), strict=True):
        fired = torch.zeros(2, 32)
        tokens = torch.zeros(2)
        for _ in range(unseen):
            again.advance()
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

    found = rungs(train(SAERun(spec, make_store()), fake_result, copy))
    for rung, kept in zip(found, copies, strict=True):
        for name, value in contents(rung).items():
            assert torch.equal(value, kept[name]) if torch.is_tensor(value) else value == kept[name]
    assert not torch.equal(found[0].sae.W_dec, found[1].sae.W_dec)


def test_groups_are_reported_by_methods_that_have_them_only(make_spec, make_store, fake_result):
    for regularizer in METHODS:
        run = SAERun(make_spec("topk", regularizer, small(regularizer)), make_store())
        groups = rungs(train(run, fake_result))[-1].groups
        assert (groups is not None) == ("groups" in run.regularizer_state)


@pytest.mark.parametrize("kind", [Progress, Rung])
def test_false_from_the_listener_ends_the_trial_there(
    kind: type, make_spec, make_store, fake_result
):
    run = SAERun(make_spec(rungs=(10 * 64, 24 * 64)), make_store())
    events = train(run, fake_result, lambda e: not (isinstance(e, kind) and e.step == 10))
    assert run.step == 10
    assert isinstance(events[-1], kind)


def test_a_trial_of_one_step_is_scored(make_spec, make_store, fake_result):
    events = train(SAERun(make_spec(steps=1), make_store()), fake_result)
    assert [type(event) for event in events] == [Progress, Rung]


def test_a_method_that_does_not_fit_the_run_is_refused_before_training(make_spec, make_store):
    spec = make_spec(regularizer="grouped", parameters={"group_update_period": 25})
    with pytest.raises(ValueError, match="longer than the run"):
        SAERun(spec, make_store())


# --- Curves ---------------------------------------------------------------------------------------


@every_architecture
@every_method
def test_every_method_trains_every_architecture_or_says_why_not(
    architecture: str, regularizer: str, make_spec, make_store
):
    spec = make_spec(architecture, regularizer, small(regularizer), lr=5e-3)
    if (regularizer, architecture) in REFUSED:
        with pytest.raises(ValueError, match=rf"{regularizer} cannot work on {architecture}"):
            SAERun(spec, make_store())
        return
    run = SAERun(spec, make_store())
    before = run.sae.W_dec.detach().clone()
    for losses in advance(run, 3):
        assert all(math.isfinite(loss) for loss in losses.values()), losses
    assert not torch.equal(run.sae.W_dec, before)
    torch.testing.assert_close(run.sae.W_dec.norm(dim=-1), torch.ones(32))


@every_architecture
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_activations_that_are_not_finite_are_an_error_that_names_the_step(
    architecture: str, bad: float, make_spec, make_store, fake_result
):
    store = make_store()
    for chunk in store._chunks:
        chunk[::7] = bad
    run = SAERun(make_spec(architecture), store)
    with pytest.raises(TrainingDivergedError, match=r"loss is (nan|inf) at step 1 of 24") as error:
        train(run, fake_result)
    assert (error.value.last_good, error.value.last_good_step) == (None, 0)


class Spoiled:
    """A store whose batches are NaN from a step on."""

    def __init__(self, store: Any, step: int) -> None:
        self.store, self.step = store, step
        self.d_in, self.scale = store.d_in, store.scale
        self.mean, self.variance = store.mean, store.variance

    def batch(self, seed: int, step: int, *args: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, is_forget = self.store.batch(seed, step, *args)
        return (x * math.nan if step >= self.step else x), is_forget

    def done_with(self, seeds: Collection[int]) -> None:
        self.store.done_with(seeds)


@every_architecture
def test_a_trial_that_meets_nan_keeps_the_sae_from_before(
    architecture: str, make_spec, make_store, fake_result
):
    spec, store = make_spec(architecture, step="saelens"), make_store()
    # Step 7 is the eighth; its row of the curve is the first that is not finite.
    run = SAERun(spec, Spoiled(store, step=7))
    with pytest.raises(TrainingDivergedError, match="loss is nan at step 8 of 24") as error:
        train(run, fake_result)
    assert error.value.last_good_step == 7
    good = SAERun(spec, store)
    advance(good, 7)
    wanted = export_sae(good.sae, store.scale).state_dict()
    kept = error.value.last_good.state_dict()
    assert kept.keys() == wanted.keys()
    assert all(torch.equal(kept[name], wanted[name]) for name in wanted)


def test_a_loss_that_explodes_ends_the_trial_with_the_last_good_sae(
    make_spec, make_store, fake_result
):
    run, events = SAERun(make_spec("standard", lr=1e6, lr_warmup=0.0), make_store()), []
    with pytest.raises(TrainingDivergedError, match=r"loss is \S+ at step \d+ of 24") as error:
        train_one(run, lambda *_: fake_result(), lambda event: events.append(event) or True)
    # Nothing is scored, and no row of the curve shows the explosion.
    assert [event.step for event in events] == list(range(1, run.step))
    losses = [row.metrics["loss"] for row in events]
    assert max(losses) <= EXPLODED * losses[0]
    assert error.value.last_good_step == run.step - 1 >= 1
    kept = error.value.last_good.state_dict()
    assert all(torch.isfinite(tensor).all() for tensor in kept.values())


def test_the_last_good_sae_is_finite_even_if_weights_go_before_the_loss_does(
    make_spec, make_store, fake_result
):
    run = SAERun(make_spec("topk", step="saelens"), make_store())
    steps = iter(range(24))
    run.sae.W_dec.register_hook(lambda grad: grad * (math.nan if next(steps) == 5 else 1))
    with pytest.raises(TrainingDivergedError, match="loss is nan at step 7 of 24") as error:
        train(run, fake_result)
    # The sixth step computes a finite loss, then loses its weights.
    assert error.value.last_good_step == 5
    kept = error.value.last_good.state_dict()
    assert all(torch.isfinite(tensor).all() for tensor in kept.values())


def test_a_loss_that_only_rises_is_no_explosion(make_spec, make_store, fake_result):
    run = SAERun(make_spec("standard", lr=0.5, lr_warmup=0.0), make_store())
    losses = [row.metrics["loss"] for row in progress(train(run, fake_result))]
    assert max(losses) > 2 * losses[0]
    assert run.step == 24


@every_architecture
def test_the_loss_falls_on_a_learnable_problem(
    architecture: str, make_spec, make_store, fake_result
):
    run = SAERun(make_spec(architecture, steps=300, lr=5e-3, sparsity=None), make_store())
    rows = progress(train(run, fake_result))
    first, last = rows[0].metrics, rows[-1].metrics
    assert last["l2_loss"] < 0.5 * first["l2_loss"]
    assert last["explained_variance"] > first["explained_variance"]


def test_a_short_run_logs_every_step_and_a_long_one_about_64_times(
    make_spec, make_store, fake_result
):
    short = progress(train(SAERun(make_spec(steps=20), make_store()), fake_result))
    assert [row.step for row in short] == list(range(1, 21))
    long = progress(train(SAERun(make_spec(steps=200, batch_size=8), make_store()), fake_result))
    assert [row.step for row in long] == [*range(3, 200, 3), 200]
    assert [row.tokens for row in long] == [row.step * 8 for row in long]


def test_a_curve_row_is_the_mean_over_the_steps_since_the_last_one(
    make_spec, make_store, fake_result
):
    spec = make_spec(steps=200, batch_size=8, regularizer="fixed_orthogonal")
    rows = progress(train(SAERun(spec, make_store()), fake_result))
    losses = advance(SAERun(spec, make_store()), 200)
    start = 0
    for row in rows:
        steps = losses[start : row.step]
        for metric, loss in (("loss", "loss"), ("l2_loss", "mse_loss"), ("penalty", "penalty")):
            mean = sum(step[loss] for step in steps) / len(steps)
            assert row.metrics[metric] == pytest.approx(mean, rel=1e-5)
        start = row.step


@torch.no_grad()
def gate(sae: Any, x: torch.Tensor) -> torch.Tensor:
    """What decides whether a feature of a gated SAE is active."""
    gates: torch.Tensor = (x - sae.b_dec * sae.cfg.apply_b_dec_to_input) @ sae.W_enc + sae.b_gate
    return gates


@every_architecture
def test_explained_variance_l0_and_losses_equal_a_direct_computation(
    architecture: str, make_spec, make_store, fake_result
):
    spec, store = make_spec(architecture, steps=12), make_store()
    rows = progress(train(SAERun(spec, store), fake_result))
    every_row = torch.cat([torch.from_numpy(chunk) for chunk in store._chunks]).double()
    every_row *= store.scale
    variance = (every_row - every_row.mean(0)).pow(2).sum(1).mean()
    again = SAERun(spec, store)
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
        sparsity = {
            "standard": lambda acts=acts: 0.5 * acts.sum(1).mean().item(),
            "gated": lambda x=x: 0.5 * gate(again.sae, x).relu().sum(1).mean().item(),
            "jumprelu": lambda acts=acts: 0.1 * (acts > 0).sum(1).double().mean().item(),
        }.get(architecture, lambda: 0.0)()
        assert metrics["sparsity_loss"] == pytest.approx(sparsity, rel=1e-4)
        again.advance()


def test_alpha_follows_its_schedule(make_spec, make_store):
    spec = make_spec(regularizer="fixed_orthogonal", schedule="cosine", alpha=2.0, steps=21)
    run = SAERun(spec, make_store())
    used = []
    for _ in range(21):
        losses = run.advance()
        used.append(run.alpha)
        sae_loss = losses["mse_loss"] + losses["auxiliary_reconstruction_loss"]
        share = (losses["loss"] - sae_loss) / losses["penalty"]
        assert share.item() == pytest.approx(run.alpha, rel=1e-3, abs=1e-4)
    assert used == pytest.approx([1 + math.cos(math.pi * step / 20) for step in range(21)])


def feedback(target: float, make_spec: Any) -> TrialSpec:
    spec = make_spec(regularizer="fixed_orthogonal", alpha=2.0, steps=21)
    return spec.model_copy(update={"alpha_schedule": Dynamic(target=target, gain=0.1, every=4)})


@pytest.mark.parametrize("target", [0.01, 1.0])
def test_alpha_follows_the_overlap_measured_before_the_step(target: float, make_spec, make_store):
    run = SAERun(feedback(target, make_spec), make_store())
    alpha = 2.0
    for step in range(21):
        overlap = run.firing.overlap()
        run.advance()
        if step in (4, 8, 12, 16, 20):
            assert 0 < overlap < 1
            alpha *= math.exp(0.1 * (overlap - target) / target)
        alpha = min(20.0, max(0.2, alpha))
        assert run.alpha == pytest.approx(alpha)
    assert (run.alpha > 2.0) == (target == 0.01)


def test_the_curve_shows_the_alpha_that_was_used(make_spec, make_store, fake_result):
    spec = feedback(0.5, make_spec)
    rows = progress(train(SAERun(spec, make_store()), fake_result))
    again, used = SAERun(spec, make_store()), []
    for _ in range(21):
        again.advance()
        used.append(again.alpha)
    assert [row.metrics["alpha"] for row in rows] == used
    assert len(set(used)) == 6


def test_the_learning_rate_warms_up_and_decays_to_zero(make_spec, make_store):
    run = SAERun(make_spec(steps=20, lr=0.01, lr_warmup=0.2, lr_decay=0.5), make_store())
    used = []
    for _ in range(20):
        used.append(run.optimizer.param_groups[0]["lr"])
        run.advance()
    assert used[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    assert used[4:10] == pytest.approx([0.01] * 6)
    assert used[10:] == pytest.approx([0.01 * (10 - i) / 10 for i in range(10)])
