"""What each method measures, and what it then does with it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from regularizer_bench import (
    CPU,
    D_IN,
    D_SAE,
    PERIOD,
    activations,
    cast,
    decoder,
    every_third,
    forget_tokens,
    make,
    observe,
    one_task_each,
    orthonormal,
    trained_state,
    value_and_gradients,
    view,
    view_of,
)
from regularizer_references import FORGET, RETAIN
from torch import Tensor

from raysae.regularizers import State, StepView
from raysae.regularizers.chunks import by_chunk, draw_chunks
from raysae.regularizers.subspace_clustered import leading_directions

SHARED = 0


def fires_on(tokens: list[list[int]], n_tokens: int) -> Tensor:
    """(n_tokens, features): feature i fires on `tokens[i]`."""
    acts = torch.zeros(n_tokens, len(tokens))
    for feature, on in enumerate(tokens):
        acts[on, feature] = 1.0
    return acts


# --- Chunks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("d_sae", "chunk_size", "sizes"),
    [(12, 5, [4, 4, 4]), (12, 7, [6, 6]), (13, 5, [5, 4, 4]), (12, 12, [12]), (12, 99, [12])],
)
def test_chunks_are_of_equal_size_as_far_as_possible(d_sae: int, chunk_size: int, sizes: list[int]):
    chunks = draw_chunks(d_sae, chunk_size, seed=1)
    assert chunks.bincount().tolist() == sizes
    assert torch.equal(chunks, draw_chunks(d_sae, chunk_size, seed=1))
    other = draw_chunks(d_sae, chunk_size, seed=2)
    assert torch.equal(chunks, other) == (len(sizes) == 1)


def test_rows_by_chunk_keep_their_order_and_are_filled_up_with_zeros():
    rows = torch.arange(1.0, 11.0).view(5, 2)
    expected = torch.stack([rows[[1, 3, 4]], torch.cat([rows[[0, 2]], torch.zeros(1, 2)])])
    assert torch.equal(by_chunk(rows, torch.tensor([1, 0, 1, 0, 0])), expected)


def test_ortsae_draws_other_chunks_at_every_update():
    method = make("ortsae_chunked", chunk_size=5, group_update_period=1)
    state = method.init_state(D_IN, D_SAE, CPU)
    seen = set()
    for step in range(10):
        observe(method, state, view(step), step)
        seen.add(tuple(state["chunks"].tolist()))
    assert len(seen) == 10


def test_ortsae_in_unequal_chunks_ignores_what_fills_them_up():
    """Chunks of 4, 3, 3; all features of the last agree, those of the others are orthogonal."""
    method = make("ortsae_chunked", chunk_size=4)
    state = method.init_state(10, 10, CPU)
    assert state["chunks"].bincount().tolist() == [4, 3, 3]
    W = orthonormal(10, 10)
    last = (state["chunks"] == 2).nonzero().flatten()
    W[last] = W[last[0]].clone()
    wanted = 10 / (2 * math.log(4)) * 3 / 10
    v = view_of(W, torch.zeros(8, 10), every_third(8))
    assert method.penalty(v, state).item() == pytest.approx(wanted, rel=1e-9)
    v.W_dec[last] *= -torch.tensor([[1], [1], [-1]])  # opposite features do not count
    assert method.penalty(v, state).item() == pytest.approx(wanted * 2 / 3, rel=1e-9)


# --- adaptive_orthogonal --------------------------------------------------------------------------


def test_the_allowance_is_the_share_of_the_rarer_features_tokens():
    acts = fires_on([[0, 1, 2, 3], [2, 3, 6, 7], [], [3]], 10)
    method = make("adaptive_orthogonal")
    state = method.init_state(D_IN, 4, CPU)
    observe(method, state, view_of(decoder(4), acts, every_third(10)), step=0)
    wanted = [[[1, 0.5, 0, 1], [0.5, 1, 0, 1], [0, 0, 0, 0], [1, 1, 0, 1]]]
    torch.testing.assert_close(state["allowance"], torch.tensor(wanted))


@pytest.mark.parametrize("chunk_size", [12, 5])
def test_adaptive_allows_exactly_the_pairs_that_fire_together(chunk_size: int):
    blocks = torch.arange(D_SAE) % 4
    method = make("adaptive_orthogonal", chunk_size=chunk_size)
    state = trained_state(method, lambda step: one_task_each(D_SAE, decoder(), seed=step))
    members = [(state["chunks"] == c).nonzero().flatten() for c in state["chunks"].unique()]
    assert len(members) == (1 if chunk_size == 12 else 3)
    for of_chunk, allowance in zip(members, state["allowance"], strict=True):
        together = blocks[of_chunk][:, None] == blocks[of_chunk][None, :]
        assert torch.equal(allowance, together.float())

    def cost(W: Tensor) -> float:
        return method.penalty(one_task_each(D_SAE, W), state).item()

    assert cost(orthonormal(4, 16)[blocks]) == pytest.approx(0.0, abs=1e-12)
    assert cost(orthonormal(3, 16)[torch.arange(D_SAE) % 3]) > 0.1  # shared across blocks


def test_the_allowances_of_new_chunks_are_measured_on_the_batch_of_the_update():
    method = make("adaptive_orthogonal", chunk_size=5)
    state = trained_state(method, steps=PERIOD + 3)
    v, chunks = view(PERIOD), draw_chunks(D_SAE, 5, seed=PERIOD)
    assert torch.equal(state["chunks"], chunks)
    for chunk, allowance in enumerate(state["allowance"]):
        fired = v.acts[:, chunks == chunk] > 0
        for i in range(4):
            for j in range(4):
                rarer = min(fired[:, i].sum(), fired[:, j].sum())
                both = (fired[:, i] & fired[:, j]).sum()
                assert allowance[i, j] == pytest.approx((both / rarer).item(), rel=1e-6)


# --- Rates on the tasks, task_masked --------------------------------------------------------------


@pytest.mark.parametrize("name", ["task_masked", "cross_task_inhibition"])
def test_task_rates_are_moving_averages_of_counts_by_hand(name: str):
    state = trained_state(make(name, ema=0.7), steps=6)
    for task, label in enumerate((True, False)):
        rates, means = torch.zeros(D_SAE), torch.zeros(D_SAE)
        for step in range(6):
            v = cast(view(step), torch.float32)
            tokens = [t for t, forget in enumerate(v.is_forget.tolist()) if forget == label]
            rate = sum((v.acts[t] > 0).float() for t in tokens) / len(tokens)
            mean = sum(v.acts[t] for t in tokens) / len(tokens)
            rates = 0.7 * rates + 0.3 * rate if step else rate
            means = 0.7 * means + 0.3 * mean if step else mean
        torch.testing.assert_close(state["firing_rate"][task], rates)
        torch.testing.assert_close(state["activation"][task], means)
        share = sum(v.is_forget.tolist()) / len(v.is_forget)
        wanted = share if label else 1 - share
        assert state["task_share"][task].item() == pytest.approx(wanted)


def test_features_are_assigned_to_the_task_on_which_alone_they_fire():
    # Tokens 0-3 are forget, 4-11 retain. Selectivities: 1, -1, 0, 0 (never), 1/3, 0.2.
    tokens = [[0, 1], [5, 6, 7], [0, 4, 5], [], [0, 4], [0, 1, 2, *range(4, 8)]]
    v = view_of(decoder(6), fires_on(tokens, 12), torch.arange(12) < 4)
    method = make("task_masked", {"threshold": 0.3})
    state = trained_state(method, lambda _: v, steps=1)
    assert state["groups"].tolist() == [FORGET, RETAIN, SHARED, SHARED, FORGET, SHARED]


def leak_of(v: StepView, state: State) -> float:
    with_leak, without = (make("task_masked", {"leak_weight": w}) for w in (1.0, 0.0))
    return (with_leak.penalty(v, state) - without.penalty(v, state)).item()


def test_the_leak_is_the_activation_on_the_other_task_relative_to_that_on_its_own():
    # Forget feature 0 fires on every forget token and half of the retain ones, half as strongly.
    is_forget = torch.arange(16) % 2 == 0
    acts = torch.zeros(16, 2)
    acts[is_forget, 0] = acts[~is_forget, 1] = 2.0
    acts[1::4, 0] = 1.0
    method = make("task_masked")
    v = view_of(decoder(2), acts, is_forget)
    state = trained_state(method, lambda _: v, steps=1)
    assert state["groups"].tolist() == [FORGET, RETAIN]
    assert leak_of(v, state) == pytest.approx((0.25 + 0) / 2)
    smaller = view_of(decoder(2), acts / 100, is_forget)
    same = trained_state(method, lambda _: smaller, steps=1)
    assert leak_of(smaller, same) == pytest.approx((0.25 + 0) / 2)


# --- cross_task_inhibition ------------------------------------------------------------------------


def skewed(step: int, d_sae: int = 8, rate: float = 0.3, rows: int = 1024) -> StepView:
    """Exponential activations of sizes 1 … d_sae; even features fire on forget tokens mostly."""
    generator = torch.Generator().manual_seed(step)
    is_forget = torch.arange(rows) % 2 == 0
    own = is_forget[:, None] == (torch.arange(d_sae) % 2 == 0)
    fires = torch.rand(rows, d_sae, generator=generator) < torch.where(own, rate, rate / 3)
    sizes = torch.arange(1.0, d_sae + 1)
    acts = -torch.rand(rows, d_sae, generator=generator).clamp_min(1e-6).log() * sizes
    return view_of(decoder(d_sae), fires * acts, is_forget)


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
def test_the_threshold_tends_to_the_quantile_of_activations_on_its_own_task(quantile: float):
    method = make("cross_task_inhibition", quantile=quantile, rate=0.1)
    state = trained_state(method, skewed, steps=150)
    batches = [skewed(step) for step in range(100, 150)]
    for feature in range(8):
        own = torch.cat([v.acts[v.is_forget == (feature % 2 == 0), feature] for v in batches])
        wanted = torch.quantile(own[own > 0], quantile).item()
        assert state["threshold"][feature].item() == pytest.approx(wanted, rel=0.1)


def test_the_threshold_starts_at_the_mean_of_activations_on_its_own_task():
    state = trained_state(make("cross_task_inhibition"), skewed, steps=1)
    v = skewed(0)
    for feature in range(8):
        own = v.acts[v.is_forget == (feature % 2 == 0), feature]
        assert state["threshold"][feature].item() == pytest.approx(own[own > 0].mean().item())


def test_only_what_exceeds_the_threshold_on_the_other_tasks_tokens_costs():
    method = make("cross_task_inhibition")
    state = method.init_state(D_IN, 3, CPU)
    state["threshold"].copy_(torch.tensor([1.0, 2.0, 0.0]))  # the last is not known yet
    state["firing_rate"].copy_(torch.tensor([[0.5, 0.1, 0.5], [0.1, 0.5, 0.1]]))
    state["l0"].fill_(2.0)
    is_forget = torch.tensor([True, True, False, False])

    def cost(acts: list[list[float]]) -> tuple[float, Tensor]:
        v = view_of(decoder(3), torch.tensor(acts).double(), is_forget)
        value, _, of_acts = value_and_gradients(lambda v: method.penalty(v, state), v)
        return value, of_acts

    # On its own task a feature may fire as it likes, on the other's up to its threshold.
    assert cost([[9, 2, 9], [9, 1.9, 9], [1, 9, 9], [0.5, 9, 9]])[0] == 0.0
    value, of_acts = cost([[0, 3, 0], [0, 0, 0], [2, 0, 0], [3, 0, 0]])
    assert value == pytest.approx(0.5 * ((1 + 4) / 2 + (0.25 + 0) / 2) / 2)
    assert of_acts.nonzero().tolist() == [[0, 1], [2, 0], [3, 0]]
    assert bool((of_acts >= 0).all())  # a step against it fires less


@pytest.mark.parametrize(("d_sae", "rate"), [(8, 0.3), (64, 0.3), (64, 0.06)])
def test_inhibition_does_not_depend_on_width_and_sparsity(d_sae: int, rate: float):
    method = make("cross_task_inhibition")
    state = trained_state(method, lambda step: skewed(step, d_sae, rate), steps=60)
    values = [method.penalty(skewed(100 + i, d_sae, rate), state).item() for i in range(10)]
    # Exponential activations with their median as threshold: excess² is 1 / ln²2 on average, a
    # feature fires three times as often on its own task, and one task in two is the other.
    expected = 0.5 * 0.5 * (2 / math.log(2) ** 2 * 0.5)
    assert sum(values) / 10 == pytest.approx(expected, rel=0.15)


# --- importance, gradient_disentangled ------------------------------------------------------------


def test_importance_is_the_moving_average_of_reconstruction_energy():
    state = trained_state(make("importance", ema=0.6), steps=4)
    for feature in range(D_SAE):
        average = 0.0
        for step in range(4):
            v = view(step)
            energies = [(a * v.W_dec[feature]).pow(2).sum().item() for a in v.acts[:, feature]]
            energy = sum(energies) / len(energies)
            average = 0.6 * average + 0.4 * energy if step else energy
        assert state["importance"][feature].item() == pytest.approx(average, rel=1e-5)


def test_gradient_statistics_are_autograds_gradients_of_the_squared_error():
    W, is_forget = decoder().requires_grad_(), forget_tokens(0)
    acts = activations(0, is_forget).double()
    error = acts @ W + decoder(1, seed=5) - decoder(len(acts), seed=6)
    v = StepView(W, acts, is_forget, error).detach()
    method = make("gradient_disentangled")
    statistics = method.statistics(v, method.init_state(D_IN, D_SAE, CPU), 0)
    for name, tokens in (("forget_gradient", is_forget), ("retain_gradient", ~is_forget)):
        loss = error[tokens].pow(2).sum()
        (wanted,) = torch.autograd.grad(loss, W, retain_graph=True)
        torch.testing.assert_close(2 * statistics[name], wanted)


def test_agreement_is_the_moving_average_of_positive_cosines_of_observed_steps():
    method = make("gradient_disentangled", observe_every=3, ema=0.6)
    state = trained_state(method, steps=9)
    for feature in range(D_SAE):
        average = 0.0
        for step in (0, 3, 6):
            v = view(step)
            forget, retain = (
                sum(v.acts[t, feature] * v.error[t] for t in tokens.nonzero().flatten())
                for tokens in (v.is_forget, ~v.is_forget)
            )
            cosine = ((forget * retain).sum() / (forget.norm() * retain.norm())).item()
            average = 0.6 * average + 0.4 * max(0.0, cosine) if step else max(0.0, cosine)
        assert state["agreement"][feature].item() == pytest.approx(average, rel=1e-4, abs=1e-7)
    assert state["observations"] == 3


# --- hierarchical ---------------------------------------------------------------------------------


def balanced(target_ratio: float, W: Tensor, updates: int = 1, rate: float = 0.5) -> State:
    method = make("hierarchical", target_ratio=target_ratio, balance_rate=rate)
    v = one_task_each(len(W), W)
    return trained_state(method, lambda _: v, steps=(updates - 1) * PERIOD + 1)


def test_beta_follows_its_closed_form():
    W = decoder(24)
    state = balanced(1.5, W)
    method: Any = make("hierarchical")
    v, terms = one_task_each(24, W), []
    for beta in (1.0, 0.0):  # within groups alone, between super-groups alone
        terms.append(method.penalty(v, state | {"beta": torch.tensor(beta)}).item())
    logit = 0.5 * math.log(terms[0] / terms[1] / 1.5)
    assert state["beta"].item() == pytest.approx(1 / (1 + math.exp(-logit)), rel=1e-5)


def test_beta_moves_weight_to_the_term_that_is_above_its_share():
    W = decoder(24)
    assert balanced(0.1, W)["beta"] > 0.6  # within groups is far above a tenth of the other
    assert balanced(10.0, W)["beta"] < 0.4
    assert balanced(0.1, W, updates=2)["beta"] > balanced(0.1, W)["beta"]
    assert balanced(0.1, W, rate=0.0)["beta"] == 0.5


@pytest.mark.parametrize(("target_ratio", "bound"), [(1e-6, 0.95), (1e6, 0.05)])
def test_beta_stays_within_its_bounds_and_comes_back(target_ratio: float, bound: float):
    state = balanced(target_ratio, decoder(24), updates=8)
    assert state["beta"].item() == pytest.approx(bound)
    back = make("hierarchical", target_ratio=1 / target_ratio)
    observe(back, state, one_task_each(24, decoder(24)), 0)
    assert state["beta"].item() == pytest.approx(1 - bound)


@pytest.mark.parametrize("name", ["hierarchical", "subspace_clustered"])
def test_groups_that_fire_on_the_same_tokens_make_up_a_super_group(name: str):
    """Eight groups of three; groups 2i and 2i + 1 fire on the same tokens half of the time."""

    def views(step: int) -> StepView:
        generator = torch.Generator().manual_seed(step)
        group = torch.arange(24) // 3
        active = torch.randint(8, (512, 1), generator=generator)
        partner = (group[None, :] // 2 == active // 2) & (
            torch.rand(512, 1, generator=generator) < 0.5
        )
        return view_of(
            decoder(24), ((group[None, :] == active) | partner).float(), every_third(512)
        )

    state = trained_state(make(name, {"n_groups": 8, "n_super_groups": 4}), views)
    groups, super_groups = state["groups"].tolist(), state["super_groups"].tolist()
    assert [groups.index(g) // 3 for g in groups] == [i // 3 for i in range(24)]
    assert [super_groups.index(s) // 6 for s in super_groups] == [i // 6 for i in range(24)]


# --- subspace_clustered ---------------------------------------------------------------------------


def projector(basis: Tensor) -> Tensor:
    return basis.T @ basis


@pytest.mark.parametrize(("n", "d_in"), [(20, 6), (4, 9), (6, 6), (1, 5)])
@pytest.mark.parametrize("rank", [1, 3, 50])
def test_leading_directions_are_those_of_the_svd(n: int, d_in: int, rank: int):
    rows = decoder(n, d_in)
    found = leading_directions(rows, rank)
    wanted = torch.linalg.svd(rows, full_matrices=False).Vh[:rank]
    assert found.shape == wanted.shape
    torch.testing.assert_close(found @ found.T, torch.eye(len(found), dtype=torch.float64))
    torch.testing.assert_close((found * wanted).sum(1).abs(), torch.ones(len(found)).double())


def test_leading_directions_leave_out_those_without_weight():
    rows = decoder(5, 2) @ decoder(2, 8)  # rank 2
    found = leading_directions(rows, 4)
    assert found.shape == (2, 8)
    wanted = torch.linalg.svd(rows, full_matrices=False).Vh[:2]
    torch.testing.assert_close(projector(found), projector(wanted))
    assert leading_directions(torch.zeros(3, 8), 4).shape == (0, 8)
    assert leading_directions(torch.zeros(0, 8), 4).shape == (0, 8)


@pytest.mark.parametrize("n", [8, 80])
def test_bases_span_the_groups_leading_directions(n: int):
    W = decoder(n, 9)
    v = one_task_each(n, W)
    state = trained_state(make("subspace_clustered"), lambda _: v, steps=1)
    for group, basis in enumerate(state["bases"].double()):
        rows = torch.nn.functional.normalize(W[state["groups"] == group], dim=1)
        rank = min(3, len(rows))
        wanted = torch.linalg.svd(rows, full_matrices=False).Vh[:rank]
        torch.testing.assert_close(projector(basis), projector(wanted), rtol=1e-4, atol=1e-5)
        gram = torch.diag((torch.arange(3) < rank).double())  # rows beyond the rank are zero
        torch.testing.assert_close(basis @ basis.T, gram, rtol=0, atol=1e-6)


def test_strength_is_the_measured_overlap_scaled_to_mean_one():
    W = decoder(40, 9)
    W[::4] += 2 * W[1::4]  # the first two groups overlap most
    v = one_task_each(40, W)
    state = trained_state(make("subspace_clustered"), lambda _: v, steps=1)
    bases, strength = state["bases"].double(), state["strength"]
    overlap = {
        (a, b): sum((p @ q).item() ** 2 for p in bases[a] for q in bases[b]) / 3
        for a in range(4)
        for b in range(4)
        if a != b
    }
    mean = sum(overlap.values()) / 12
    for (a, b), value in overlap.items():
        assert strength[a, b].item() == pytest.approx(value / mean, rel=1e-4)
    assert not strength.diagonal().any()
    first, second = state["groups"][0], state["groups"][1]
    assert strength[first, second] == strength.max()
