"""One training step against SAELens' own trainer, the regularizers' gradients and naive counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainingSAE, TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from training_bench import (
    ARCHITECTURES,
    METHODS,
    REFUSED,
    every_architecture,
    every_penalty,
    small,
)

from raysae.regularizers import REGISTRY, Regularizer, StepView
from raysae.training.collective import Alone
from raysae.training.loop import train_one
from raysae.training.run import SAERun
from raysae.training.saes import make_training_sae
from raysae.training.step import RATE_EMA, FiringRecord, train_step

CPU = torch.device("cpu")
LOOKS_AT_ACTIVATIONS = {"task_masked", "cross_task_inhibition"}


def make(regularizer: str) -> Regularizer:
    return REGISTRY[regularizer](**small(regularizer))


def gradients(
    sae: TrainingSAE[Any],
    store: Any,
    regularizer: str = "none",
    alpha: float = 0.0,
    grad_clip: float = 1e9,
) -> dict[str, Tensor]:
    """The gradients left by one step on a batch of the store."""
    batch, is_forget = store.batch(0, 0, 64)
    method = make(regularizer)
    train_step(
        sae,
        torch.optim.Adam(sae.parameters()),
        batch,
        is_forget,
        step=0,
        alpha=alpha,
        coefficients=dict.fromkeys(sae.get_coefficients(), 0.5),
        regularizer=method,
        regularizer_state=method.init_state(16, 32, CPU),
        firing=FiringRecord.zeros(32, CPU),
        dead_after=100,
        grad_clip=grad_clip,
        collective=Alone(),
    )
    return {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}


def saelens_trainer(run: SAERun, rows: Any) -> SAETrainer[Any, Any]:
    """SAELens' trainer with the spec's own hyperparameters and initial weights."""
    training = run.spec.training
    sae = make_training_sae(
        run.spec.sae, run.source.d_in, seed=run.spec.seed, b_dec=run.source.mean
    )
    config = SAETrainerConfig(
        total_training_samples=training.tokens,
        train_batch_size_samples=training.batch_size,
        lr=training.lr,
        lr_end=training.lr,
        lr_warm_up_steps=int(training.lr_warmup * training.steps),
        lr_decay_steps=int(training.lr_decay * training.steps),
        dead_feature_window=training.dead_after,
    )
    return SAETrainer(config, sae, rows)


def with_dead_features(architecture: str, make_spec: Any) -> Any:
    """Twelve steps of few rows and few active features, so that most features do not fire often."""
    sparsity = 1.0 if architecture != "standard" else None
    return make_spec(
        architecture, steps=12, batch_size=8, sparsity=sparsity, dead_after=2,
        lr=3e-3, lr_warmup=0.3, lr_decay=0.3,
    )  # fmt: skip


@every_architecture
@pytest.mark.parametrize("steps", [1, 12])
def test_training_without_a_penalty_is_saelens_own_plus_renormalised_decoder_rows(
    architecture: str, steps: int, make_spec, make_store
):
    # Twelve steps go through warm-up and decay of the learning rate and have dead features.
    spec, store = with_dead_features(architecture, make_spec), make_store()
    run = SAERun(spec, store)
    batches = [store.batch(spec.seed, step, 8)[0] for step in range(steps)]
    trainer = saelens_trainer(run, iter(batches))
    for batch in batches:
        run.advance()
        trainer.step(batch)
        trainer.n_training_steps += 1
        with torch.no_grad():
            trainer.sae.W_dec /= trainer.sae.W_dec.norm(dim=-1, keepdim=True)
    theirs = trainer.sae.state_dict()
    ours = run.sae.state_dict()
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-7)
    assert torch.equal(run.firing.steps_since_fired, trainer.n_forward_passes_since_fired)
    assert run.optimizer.param_groups[0]["lr"] == trainer.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_that_comparison_meets_dead_features(architecture: str, make_spec, make_store):
    run = SAERun(with_dead_features(architecture, make_spec), make_store())
    assert max(run.advance()["auxiliary_reconstruction_loss"] for _ in range(12)) > 0


@every_penalty
def test_decoder_rows_stay_at_unit_norm(regularizer: str, make_spec, make_store):
    spec = make_spec("topk", regularizer, {}, alpha=5.0, steps=300, lr=0.02)
    run = SAERun(spec, make_store())
    for _ in range(8):
        run.advance()
        torch.testing.assert_close(run.sae.W_dec.norm(dim=-1), torch.ones(32))


@pytest.mark.parametrize(
    ("architecture", "regularizer"),
    [
        (architecture, method)
        for architecture in ARCHITECTURES
        for method in METHODS
        if REGISTRY[method].uses_alpha and (method, architecture) not in REFUSED
    ],
)
def test_a_penalty_adds_alpha_times_its_own_gradient(
    architecture: str, regularizer: str, make_spec, make_store
):
    spec, store, alpha = make_spec(architecture), make_store(), 0.7
    sae, same, third = (make_training_sae(spec.sae, 16, seed=1) for _ in range(3))
    batch, is_forget = store.batch(0, 0, 64)
    output = third.training_forward_pass(
        TrainStepInput(batch, dict.fromkeys(third.get_coefficients(), 0.5), None, 0, False)
    )
    view = StepView(third.W_dec, output.feature_acts, is_forget, output.sae_out - batch)
    method = make(regularizer)
    state = method.init_state(16, 32, CPU)
    seen = view.detach()
    method.update(state, method.statistics(seen, state, 0), seen.W_dec, 0)  # as the step, first
    names, parameters = zip(*third.named_parameters(), strict=True)
    penalty_gradients = dict(
        zip(
            names,
            torch.autograd.grad(method.penalty(view, state), parameters, materialize_grads=True),
            strict=True,
        )
    )
    looked_at = "W_enc" if regularizer in LOOKS_AT_ACTIVATIONS else "W_dec"
    assert penalty_gradients[looked_at].abs().max() > 1e-3

    without = gradients(sae, store)
    with_penalty = gradients(same, store, regularizer, alpha)
    for name in without:
        if regularizer not in LOOKS_AT_ACTIVATIONS and name != "W_dec":
            assert torch.equal(with_penalty[name], without[name])
        difference = with_penalty[name] - without[name]
        torch.testing.assert_close(
            difference, alpha * penalty_gradients[name], rtol=1e-3, atol=1e-4
        )


@every_penalty
def test_alpha_zero_is_the_baseline(regularizer: str, make_spec, make_store):
    spec, store = make_spec(), make_store()
    sae, same = (make_training_sae(spec.sae, 16, seed=1) for _ in range(2))
    without, with_zero = gradients(sae, store), gradients(same, store, regularizer, alpha=0.0)
    for name in without:
        torch.testing.assert_close(with_zero[name], without[name], rtol=0, atol=1e-7)


def test_gradients_are_clipped_to_the_global_norm(make_spec, make_store):
    spec, store = make_spec(), make_store()
    sae, same = (make_training_sae(spec.sae, 16, seed=1) for _ in range(2))
    free, clipped = gradients(sae, store), gradients(same, store, grad_clip=0.01)
    norm = torch.cat([g.flatten() for g in free.values()]).norm()
    assert norm > 0.01
    for name in free:
        torch.testing.assert_close(clipped[name], free[name] * 0.01 / norm, rtol=1e-3, atol=1e-9)


def test_the_penalty_is_reported_before_alpha(make_spec, make_store):
    store = make_store()
    run = SAERun(make_spec(regularizer="fixed_orthogonal", alpha=3.0), store)
    W = run.sae.W_dec.detach().double()
    cosines = W @ W.T - torch.eye(32)
    losses = run.advance()
    expected = 16 * cosines.pow(2).sum() / (32 * 31)
    assert losses["penalty"].item() == pytest.approx(expected.item(), rel=1e-4)
    rest = losses["mse_loss"] + losses["auxiliary_reconstruction_loss"]
    assert losses["loss"].item() == pytest.approx((rest + 3 * expected).item(), rel=1e-4)


# --- FiringRecord ---------------------------------------------------------------------------------


def firing_batches(n: int) -> list[tuple[Tensor, Tensor]]:
    """n batches of (fired (20, 6), is_forget (20,)); feature 5 never fires, 4 in the first only."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for index in range(n):
        fired = (torch.rand(20, 6, generator=generator) < 0.3).float()
        fired[:, 5] = 0
        fired[:, 4] *= index == 0
        batches.append((fired, torch.rand(20, generator=generator) < 0.4))
    return batches


def count(record: FiringRecord, fired: Tensor, is_forget: Tensor) -> None:
    on_task = [(fired[task].sum(0), task.sum()) for task in (is_forget, ~is_forget)]
    record.add(*(torch.stack(part).float() for part in zip(*on_task, strict=True)))


def test_firing_rates_equal_a_count_by_hand():
    record = FiringRecord.zeros(6, CPU)
    forget, retain = [0] * 6, [0] * 6
    tokens_forget = tokens_retain = 0
    for fired, is_forget in firing_batches(5):
        count(record, fired, is_forget)
        for row, label in zip(fired.tolist(), is_forget.tolist(), strict=True):
            tokens_forget, tokens_retain = tokens_forget + label, tokens_retain + (not label)
            for feature, value in enumerate(row):
                forget[feature] += value > 0 and label
                retain[feature] += value > 0 and not label
    forget_rate, retain_rate = record.rates()
    torch.testing.assert_close(forget_rate, torch.tensor(forget) / tokens_forget)
    torch.testing.assert_close(retain_rate, torch.tensor(retain) / tokens_retain)


def test_steps_since_firing_are_counted_from_the_last_time():
    record = FiringRecord.zeros(6, CPU)
    for fired, is_forget in firing_batches(5):
        count(record, fired, is_forget)
    assert record.steps_since_fired.tolist() == [0, 0, 0, 0, 4, 5]


def test_resetting_rates_forgets_rates_but_not_who_is_dead():
    record = FiringRecord.zeros(6, CPU)
    batches = firing_batches(5)
    for fired, is_forget in batches:
        count(record, fired, is_forget)
    record.reset_rates()
    assert not torch.cat(record.rates()).any()
    assert record.steps_since_fired.tolist() == [0, 0, 0, 0, 4, 5]
    fired, is_forget = batches[1]
    count(record, fired, is_forget)
    torch.testing.assert_close(record.rates()[0], fired[is_forget].mean(0))


def test_rates_without_any_token_are_zero():
    record = FiringRecord.zeros(3, CPU)
    count(record, torch.ones(4, 3), torch.zeros(4, dtype=torch.bool))
    forget_rate, retain_rate = record.rates()
    assert (forget_rate.tolist(), retain_rate.tolist()) == ([0, 0, 0], [1, 1, 1])


def test_the_overlap_is_that_of_moving_averages_by_hand():
    record = FiringRecord.zeros(6, CPU)
    forget, retain = [0.0] * 6, [0.0] * 6
    for fired, is_forget in firing_batches(5):
        count(record, fired, is_forget)
        for feature in range(6):
            for average, label in ((forget, True), (retain, False)):
                on = [
                    row
                    for row, of in zip(fired.tolist(), is_forget.tolist(), strict=True)
                    if of == label
                ]
                rate = sum(row[feature] for row in on) / len(on)
                average[feature] = RATE_EMA * average[feature] + (1 - RATE_EMA) * rate
    pairs = list(zip(forget, retain, strict=True))
    expected = sum(min(pair) for pair in pairs) / sum(max(pair) for pair in pairs)
    assert 0 < expected < 1
    assert record.overlap() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("on_forget", "on_retain", "overlap"),
    [
        ([1, 1, 0, 0], [0, 0, 1, 1], 0.0),  # no feature fires on both
        ([1, 1, 1, 1], [1, 1, 1, 1], 1.0),
        ([1, 1, 0, 0], [0, 1, 1, 0], 1 / 3),
        ([0, 0, 0, 0], [0, 0, 0, 0], 0.0),
    ],
)
def test_the_overlap_does_not_depend_on_how_many_batches_were_seen(
    on_forget: list[int], on_retain: list[int], overlap: float
):
    record = FiringRecord.zeros(4, CPU)
    is_forget = torch.tensor([True, False, False])
    assert record.overlap() == 0.0
    for _ in range(3):
        count(record, torch.tensor([on_forget, on_retain, on_retain]).float(), is_forget)
        assert record.overlap() == pytest.approx(overlap)
    record.reset_rates()
    assert record.overlap() == pytest.approx(overlap)


def test_features_that_cannot_fire_are_counted_as_dead(make_spec, make_store, fake_result):
    run = SAERun(make_spec("standard", steps=10, dead_after=4), make_store())
    with torch.no_grad():
        run.sae.b_enc[:3] = -1e6
    rows = []
    train_one(run, lambda *_: fake_result(), lambda event: rows.append(event) or True)
    dead = [row.metrics["dead_features"] for row in rows[:-1]]
    assert dead == [0.0] * 4 + [3.0] * 6
