"""What every regularizer keeps between steps, when it changes, and what a method refuses."""

from __future__ import annotations

import itertools

import pytest
import torch
from regularizer_bench import (
    CPU,
    D_IN,
    D_SAE,
    PERIOD,
    ROWS,
    cast,
    clone,
    decoder,
    every_method,
    every_third,
    grouping,
    make,
    observe,
    periodic,
    rows_of,
    same_partition,
    trained_state,
    view,
    view_of,
    with_cofiring,
)
from regularizer_references import STATE_SHAPES
from torch import Tensor

from raysae.regularizers import REGISTRY, StepView, cofiring
from raysae.regularizers import grouping as grouping_module
from raysae.regularizers.activations import DenseActivations

AVERAGES = {"cofiring", "observations", "firing_rate", "activation", "task_share"}
"""State that follows the observed batches; all the rest of a periodic method changes at updates."""
MATRYOSHKA = "matryoshka_batchtopk"
unperiodic = sorted(set(REGISTRY) - set(periodic))


@pytest.mark.parametrize("name", REGISTRY)
def test_state_has_the_documented_shapes_and_keeps_them(name: str):
    method = make(name)
    initial = method.init_state(D_IN, D_SAE, CPU)
    assert {key: tuple(tensor.shape) for key, tensor in initial.items()} == STATE_SHAPES[name]
    trained = trained_state(method)
    assert trained.keys() == initial.keys()
    for key, tensor in initial.items():
        assert (trained[key].shape, trained[key].dtype) == (tensor.shape, tensor.dtype)


@every_method
def test_two_half_batches_added_up_give_the_state_of_the_whole_batch(name: str, parameters: dict):
    method = make(name, parameters)
    whole, halves = (method.init_state(D_IN, D_SAE, CPU) for _ in range(2))
    for step in range(2 * PERIOD + 2):
        v = cast(view(step), torch.float32)
        parts = [
            method.statistics(rows_of(v, rows), halves, step)
            for rows in (slice(0, ROWS // 2), slice(ROWS // 2, ROWS))
        ]
        assert parts[0].keys() == parts[1].keys()
        summed = {key: parts[0][key] + parts[1][key] for key in parts[0]}
        method.update(halves, summed, v.W_dec, step)
        method.update(whole, method.statistics(v, whole, step), v.W_dec, step)
    for key in whole:
        torch.testing.assert_close(halves[key], whole[key], rtol=1e-4, atol=1e-6)


@every_method
def test_the_same_batches_give_the_same_state_twice(name: str, parameters: dict):
    first, second = (trained_state(make(name, parameters)) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@every_method
def test_statistics_leave_the_state_and_the_batch_alone(name: str, parameters: dict):
    method, v = make(name, parameters), cast(view(0), torch.float32)
    state = trained_state(method)
    before = clone(state), cast(v, torch.float64)  # casting copies
    for step in range(PERIOD):
        method.statistics(v, state, step)
    assert all(torch.equal(state[key], before[0][key]) for key in state)
    assert torch.equal(v.acts.double(), before[1].acts)
    assert torch.equal(v.error.double(), before[1].error)


@pytest.mark.parametrize("name", periodic)
@pytest.mark.parametrize("period", [5, 20])
def test_groups_change_at_multiples_of_the_period_only(name: str, period: int):
    # Without memory and with low bars, so that what can change at an update does.
    method = make(name, group_update_period=period, chunk_size=5, ema=0.0, threshold=0.1)
    state = method.init_state(D_IN, D_SAE, CPU)
    changed = []
    for step in range(3 * period + 1):
        before = {key: state[key].clone() for key in state.keys() - AVERAGES}
        observe(method, state, view(step, decoder(seed=step)), step)
        if not all(torch.equal(state[key], before[key]) for key in before):
            changed.append(step)
    # Random chunks start with those of step 0.
    assert [step for step in changed if step > 0] == [period, 2 * period, 3 * period]


@pytest.mark.parametrize("name", with_cofiring)
@pytest.mark.parametrize("period", [1, 7, 16, 41])
def test_cofiring_is_the_moving_average_of_the_observed_batches(name: str, period: int):
    method = make(name, group_update_period=period, ema=0.8)
    state = method.init_state(D_IN, D_SAE, CPU)
    average: dict[tuple[int, int], float] = {}
    for step in range(20):
        v = rows_of(view(step), slice(0, 16))
        observe(method, state, v, step)
        if step % max(1, period // 8) == 0:
            fired = (v.acts > 0).tolist()
            for i in range(D_SAE):
                for j in range(D_SAE):
                    rate = sum(token[i] and token[j] for token in fired) / 16
                    average[i, j] = 0.8 * average[i, j] + 0.2 * rate if step else rate
    table = state["cofiring"].view(D_SAE, D_SAE)
    for (i, j), expected in average.items():
        assert table[i, j].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


# --- Groups ---------------------------------------------------------------------------------------


def block_view(step: int, blocks: Tensor, rows: int = 256, drop: float = 0.0) -> StepView:
    """Each token fires one block of features, except for a share that misses it."""
    generator = torch.Generator().manual_seed(step)
    active = torch.randint(int(blocks.max()) + 1, (rows, 1), generator=generator)
    acts = 0.5 + torch.rand(rows, len(blocks), generator=generator)
    fires = (blocks[None, :] == active) & (torch.rand(acts.shape, generator=generator) >= drop)
    return view_of(decoder(len(blocks)), acts * fires, every_third(rows))


@pytest.mark.parametrize("name", grouping)
@pytest.mark.parametrize("seed", range(3))
def test_planted_groups_are_found(name: str, seed: int):
    generator = torch.Generator().manual_seed(seed)
    planted = (torch.arange(40) % 4)[torch.randperm(40, generator=generator)]
    state = trained_state(make(name), lambda step: block_view(step, planted, drop=0.2))
    assert same_partition(state["groups"], planted)


@pytest.mark.parametrize("d_sae", [40, 43])
def test_planted_groups_are_found_when_features_share_columns(
    d_sae: int, monkeypatch: pytest.MonkeyPatch
):
    for module in (cofiring, grouping_module):
        monkeypatch.setattr(module, "PROFILE_WIDTH", 16)
    generator = torch.Generator().manual_seed(0)
    planted = (torch.arange(d_sae) % 4)[torch.randperm(d_sae, generator=generator)]
    state = trained_state(make("grouped"), lambda step: block_view(step, planted, drop=0.2))
    assert state["cofiring"].shape == (d_sae, 16)
    assert same_partition(state["groups"], planted)


def test_a_shared_column_counts_the_firing_of_all_its_features(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cofiring, "PROFILE_WIDTH", 5)
    acts = view(0).acts
    counts = cofiring.cofiring_counts(DenseActivations(acts))
    assert counts.shape == (D_SAE, 5)
    fired = (acts > 0).tolist()
    for i in range(D_SAE):
        for column in range(5):
            sharing = [j for j in range(D_SAE) if j % 5 == column]
            assert counts[i, column] == sum(token[i] * token[j] for token in fired for j in sharing)


def test_groups_follow_when_the_features_that_fire_together_change():
    before, after = torch.arange(40) // 10, torch.arange(40) % 4
    state = trained_state(
        make("grouped", ema=0.5),
        lambda step: block_view(step, before if step < PERIOD else after),
        steps=10 * PERIOD + 1,
    )
    assert same_partition(state["groups"], after)


@pytest.mark.parametrize("name", grouping)
def test_groups_keep_their_labels_from_update_to_update(name: str):
    """Also when features come and go: each update starts from the centroids of the last."""
    planted = torch.arange(40) % 4
    method = make(name, ema=0.0)
    state = method.init_state(D_IN, 40, CPU)
    labels = []
    for step in range(0, 6 * PERIOD, PERIOD):
        v = block_view(step, planted, drop=0.2)
        silent = torch.rand(40, generator=torch.Generator().manual_seed(step)) < 0.3
        observe(method, state, view_of(v.W_dec, v.acts * ~silent, v.is_forget), step)
        found = state["groups"].clone()
        found[silent] = -1
        labels.append(found)
    for first, second in itertools.pairwise(labels):
        both = (first >= 0) & (second >= 0)
        assert torch.equal(first[both], second[both])


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
@pytest.mark.parametrize("name", grouping)
def test_groups_are_found_when_most_features_never_fire(name: str):
    blocks = torch.tensor([0, 0, 1, 1] + [9] * 36)

    def views(step: int) -> StepView:
        v = block_view(step, blocks[:4])
        return view_of(decoder(40), torch.cat([v.acts, torch.zeros(256, 36)], 1), v.is_forget)

    groups = trained_state(make(name), views)["groups"]
    assert groups[0] == groups[1] != groups[2] == groups[3]
    assert 0 <= groups.min() <= groups.max() < 4


# --- What a method refuses ------------------------------------------------------------------------


@pytest.mark.parametrize("name", periodic)
def test_a_period_longer_than_the_run_is_refused(name: str):
    method = make(name, group_update_period=100)
    method.check("topk", d_sae=64, total_steps=100)
    with pytest.raises(ValueError, match=r"group_update_period 100 .*99 steps"):
        method.check("topk", d_sae=64, total_steps=99)


@pytest.mark.parametrize("name", grouping)
def test_more_groups_than_features_are_refused(name: str):
    method = make(name, n_groups=64)
    method.check("topk", d_sae=64, total_steps=1000)
    with pytest.raises(ValueError, match=r"n_groups 64 .*d_sae 63"):
        method.check("topk", d_sae=63, total_steps=1000)


@pytest.mark.parametrize("name", ["hierarchical", "subspace_clustered"])
def test_as_many_super_groups_as_groups_are_refused(name: str):
    make(name, n_groups=5, n_super_groups=4).check("topk", d_sae=64, total_steps=1000)
    with pytest.raises(ValueError, match="n_super_groups 4 must be below n_groups 4"):
        make(name, n_groups=4, n_super_groups=4).check("topk", d_sae=64, total_steps=1000)


def test_gradient_disentangled_refuses_an_sae_of_nested_prefixes():
    method = make("gradient_disentangled")
    method.check("batchtopk", d_sae=64, total_steps=1000)
    with pytest.raises(ValueError, match=f"gradient_disentangled cannot work on {MATRYOSHKA}"):
        method.check(MATRYOSHKA, d_sae=64, total_steps=1000)


@pytest.mark.parametrize("name", unperiodic)
def test_a_method_without_updates_works_at_any_size(name: str):
    make(name, observe_every=1).check("topk", d_sae=100_000, total_steps=1)


def test_gradients_that_are_looked_at_once_are_refused():
    method = make("gradient_disentangled", observe_every=8)
    method.check("topk", d_sae=64, total_steps=8)
    with pytest.raises(ValueError, match=r"observe_every 8 is longer than the run \(7 steps\)"):
        method.check("topk", d_sae=64, total_steps=7)


@pytest.mark.parametrize("name", unperiodic)
def test_a_method_without_updates_has_no_period(name: str):
    with pytest.raises(ValueError, match="group_update_period"):
        REGISTRY[name](group_update_period=10)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("group_update_period", 0),
        ("ema", 1.0),
        ("chunk_size", 1),
        ("n_groups", 1),
        ("n_super_groups", 1),
        ("subspace_rank", 0),
        ("target_ratio", 0.0),
        ("balance_rate", -0.1),
        ("threshold", 1.0),
        ("leak_weight", -0.1),
        ("quantile", 1.0),
        ("rate", 0.0),
        ("observe_every", 0),
        ("scope", "both"),
    ],
)
def test_parameters_out_of_bounds_are_refused(field: str, value: object):
    having = [name for name in REGISTRY if field in REGISTRY[name].model_fields]
    assert having
    for name in having:
        with pytest.raises(ValueError, match=field):
            make(name, {field: value})
