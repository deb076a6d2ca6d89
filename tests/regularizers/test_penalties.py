"""Every regularizer against a naive double loop in float64, and the laws that all of them obey.

The tests run over `REGISTRY`: a new method is tested as soon as it is registered, and fails here
until `REFERENCES` and `STATE_SHAPES` say what it should compute and keep.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from raysae.regularizers import REGISTRY, Regularizer, State

CPU = torch.device("cpu")
D_IN, D_SAE, PERIOD = 7, 12, 5
"""D_SAE is the size of no other axis, so an axis of that size is an axis of features."""

SMALL = {"group_update_period": PERIOD, "n_groups": 3}
VARIANTS: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in REGISTRY] + [
    ("grouped", {"scope": "within"}),
]
AVERAGES = {"cofiring", "observations"}
"""State that follows every observed batch; all the rest changes at updates only."""

every_method = pytest.mark.parametrize(
    ("name", "parameters"), VARIANTS, ids=lambda v: v if isinstance(v, str) else str(v or "")
)
penalties = [(name, parameters) for name, parameters in VARIANTS if REGISTRY[name].uses_alpha]
regrouping = [n for n in REGISTRY if "group_update_period" in REGISTRY[n].searchable]


# --- References: loops over pairs of features, nothing shared with the implementation -------------


def cosine(W: Tensor, i: int, j: int) -> Tensor:
    return (W[i] * W[j]).sum() / (W[i].pow(2).sum().sqrt() * W[j].pow(2).sum().sqrt())


def mean_over(pairs: list[Tensor], W: Tensor) -> Tensor:
    """d_in · mean of the pairs' terms; 0 without pairs."""
    return W.shape[1] * torch.stack(pairs).mean() if pairs else W.sum() * 0


def ordered_pairs(W: Tensor) -> list[tuple[int, int]]:
    return [(i, j) for i in range(len(W)) for j in range(len(W)) if i != j]


def none_reference(_method: Regularizer, W: Tensor, _state: State) -> Tensor:
    return W.sum() * 0


def fixed_orthogonal_reference(_method: Regularizer, W: Tensor, _state: State) -> Tensor:
    return mean_over([cosine(W, i, j) ** 2 for i, j in ordered_pairs(W)], W)


def adaptive_orthogonal_reference(_method: Regularizer, W: Tensor, state: State) -> Tensor:
    allowed = state["allowance"].tolist()
    terms = []
    for i, j in ordered_pairs(W):
        excess = abs(cosine(W, i, j)) - allowed[i][j]
        terms.append(excess**2 if excess > 0 else excess * 0)
    return mean_over(terms, W)


def grouped_reference(method: Any, W: Tensor, state: State) -> Tensor:
    label = state["groups"].tolist()
    counted = [
        (i, j) for i, j in ordered_pairs(W) if (label[i] == label[j]) == (method.scope == "within")
    ]
    return mean_over([cosine(W, i, j) ** 2 for i, j in counted], W)


REFERENCES: dict[str, Callable[[Any, Tensor, State], Tensor]] = {
    "none": none_reference,
    "fixed_orthogonal": fixed_orthogonal_reference,
    "adaptive_orthogonal": adaptive_orthogonal_reference,
    "grouped": grouped_reference,
}

STATE_SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "none": {},
    "fixed_orthogonal": {},
    "adaptive_orthogonal": {
        "cofiring": (D_SAE, D_SAE),
        "observations": (),
        "allowance": (D_SAE, D_SAE),
    },
    "grouped": {
        "cofiring": (D_SAE, D_SAE),
        "observations": (),
        "groups": (D_SAE,),
        "centroids": (3, D_SAE),
    },
}


# --- Things to test with --------------------------------------------------------------------------


def make(name: str, parameters: dict[str, Any] | None = None, **more: Any) -> Regularizer:
    small = {key: value for key, value in SMALL.items() if key in REGISTRY[name].model_fields}
    return REGISTRY[name](**(small | (parameters or {}) | more))


def decoder(n: int = D_SAE, d_in: int = D_IN, seed: int = 0) -> Tensor:
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(n: int, d_in: int) -> Tensor:
    return torch.linalg.qr(decoder(d_in, d_in))[0][:n]


def activations(step: int, rows: int = 64, d_sae: int = D_SAE) -> Tensor:
    """(rows, d_sae) ≥ 0 with features that fire at different rates and partly together."""
    generator = torch.Generator().manual_seed(1000 + step)
    drivers = torch.rand(rows, 4, generator=generator) < 0.4
    noise = torch.rand(rows, d_sae, generator=generator)
    fires = drivers[:, torch.arange(d_sae) % 4] & (noise < torch.linspace(0.3, 1.0, d_sae))
    return fires * (0.5 + noise)


def is_forget(rows: int = 64) -> Tensor:
    return torch.arange(rows) % 3 == 0


def observe(method: Regularizer, state: State, acts: Tensor, step: int) -> None:
    statistics = method.statistics(acts, is_forget(len(acts)), step)
    method.update(state, statistics, step)


def trained_state(method: Regularizer, steps: int = 2 * PERIOD + 1) -> State:
    state = method.init_state(D_IN, D_SAE, CPU)
    for step in range(steps):
        observe(method, state, activations(step), step)
    return state


def value_and_gradient(penalty: Callable[[Tensor], Tensor], W: Tensor) -> tuple[float, Tensor]:
    W = W.detach().clone().requires_grad_()
    value = penalty(W)
    if value.requires_grad:
        value.backward()
    return value.item(), torch.zeros_like(W) if W.grad is None else W.grad


def state_counting_all(method: Regularizer, d_in: int, n: int) -> State:
    """A state in which the method counts pairs of all kinds: `grouped` in round-robin groups."""
    state = method.init_state(d_in, n, CPU)
    if "groups" in state:
        state["groups"].copy_(torch.arange(n) % 3)
    return state


# --- What every method computes -------------------------------------------------------------------


def test_every_method_has_a_reference_and_a_documented_state():
    for name in REGISTRY:
        assert name in REFERENCES, f"write a double-loop reference of {name!r} in REFERENCES"
        assert name in STATE_SHAPES, f"list the state tensors of {name!r} in STATE_SHAPES"


@every_method
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_value_and_gradient_equal_the_double_loop(name: str, parameters: dict, seed: int):
    method = make(name, parameters)
    state = trained_state(method)
    W = decoder(seed=seed)
    reference = REFERENCES[name]
    value, gradient = value_and_gradient(lambda w: method.penalty(w, state), W)
    wanted, wanted_gradient = value_and_gradient(lambda w: reference(method, w, state), W)
    assert value == pytest.approx(wanted, rel=1e-10)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-9, atol=1e-12)


@every_method
def test_value_equals_the_double_loop_before_the_first_update(name: str, parameters: dict):
    method = make(name, parameters)
    state = method.init_state(D_IN, D_SAE, CPU)
    value = method.penalty(decoder(), state)
    assert value.item() == pytest.approx(REFERENCES[name](method, decoder(), state).item())


@every_method
def test_float32_is_good_enough_to_train_with(name: str, parameters: dict):
    method = make(name, parameters)
    state = trained_state(method)
    exact, exact_gradient = value_and_gradient(lambda w: method.penalty(w, state), decoder())
    value, gradient = value_and_gradient(lambda w: method.penalty(w, state), decoder().float())
    assert value == pytest.approx(exact, rel=1e-5)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-4, atol=1e-6)


@every_method
@pytest.mark.parametrize("seed", [0, 1])
def test_permuting_features_and_state_together_changes_nothing(
    name: str, parameters: dict, seed: int
):
    method = make(name, parameters)
    state = trained_state(method)
    order = torch.randperm(D_SAE, generator=torch.Generator().manual_seed(seed))
    permuted = dict(state)
    for key, tensor in state.items():
        for axis, size in enumerate(tensor.shape):
            if size == D_SAE:
                tensor = tensor.index_select(axis, order)
        permuted[key] = tensor
    value, gradient = value_and_gradient(lambda w: method.penalty(w, state), decoder())
    same, same_gradient = value_and_gradient(
        lambda w: method.penalty(w, permuted), decoder()[order]
    )
    assert same == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(same_gradient, gradient[order])


@every_method
def test_scaling_decoder_rows_changes_nothing(name: str, parameters: dict):
    method = make(name, parameters)
    state = trained_state(method)
    lengths = torch.logspace(-3, 3, D_SAE, dtype=torch.float64)[:, None]
    value = method.penalty(decoder(), state).item()
    assert method.penalty(decoder() * lengths, state).item() == pytest.approx(value, rel=1e-12)


@every_method
@pytest.mark.parametrize("d_in", [D_SAE, D_SAE + 4])
def test_an_orthonormal_decoder_costs_nothing(name: str, parameters: dict, d_in: int):
    method = make(name, parameters)
    for state in (trained_state(method), state_counting_all(method, d_in, D_SAE)):
        value = method.penalty(orthonormal(D_SAE, d_in), state).item()
        assert value == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "parameters", "labels"),
    [
        ("fixed_orthogonal", {}, None),
        ("adaptive_orthogonal", {}, None),
        ("grouped", {"scope": "between"}, [0, 1] * 6),
        ("grouped", {"scope": "within"}, [0] * 12),
    ],
)
def test_a_duplicated_pair_that_counts_costs_something(
    name: str, parameters: dict, labels: list[int] | None
):
    method = make(name, parameters)
    state = method.init_state(16, D_SAE, CPU)
    if labels is not None:
        state["groups"].copy_(torch.tensor(labels))
    W = orthonormal(D_SAE, 16)
    W[1] = W[0]
    assert method.penalty(W, state).item() > 0.1


@pytest.mark.parametrize(
    ("name", "parameters", "labels"),
    [
        ("grouped", {"scope": "between"}, [0, 0] + [1] * 10),
        ("grouped", {"scope": "within"}, [0, 1] + [2] * 10),
    ],
)
def test_a_duplicated_pair_that_does_not_count_is_free(
    name: str, parameters: dict, labels: list[int]
):
    method = make(name, parameters)
    state = method.init_state(16, D_SAE, CPU)
    state["groups"].copy_(torch.tensor(labels))
    W = orthonormal(D_SAE, 16)
    W[1] = W[0]
    assert method.penalty(W, state).item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(("name", "parameters"), penalties)
@pytest.mark.parametrize(("d_in", "n"), [(16, 256), (64, 512), (128, 96), (32, 1024)])
def test_random_directions_cost_one_at_any_size(name: str, parameters: dict, d_in: int, n: int):
    method = make(name, parameters)
    value = method.penalty(decoder(n, d_in), state_counting_all(method, d_in, n)).item()
    assert value == pytest.approx(1.0, abs=0.1)


@every_method
def test_the_penalty_does_not_touch_the_state(name: str, parameters: dict):
    method = make(name, parameters)
    state = trained_state(method)
    before = {key: tensor.clone() for key, tensor in state.items()}
    value_and_gradient(lambda w: method.penalty(w, state), decoder())
    assert all(torch.equal(state[key], before[key]) for key in before)


@every_method
def test_a_zero_row_gives_a_finite_penalty_and_gradient(name: str, parameters: dict):
    method = make(name, parameters)
    W = decoder()
    W[3] = 0
    value, gradient = value_and_gradient(lambda w: method.penalty(w, trained_state(method)), W)
    assert torch.isfinite(torch.tensor(value))
    assert torch.isfinite(gradient).all()


def test_grouped_with_one_group_has_no_pairs_between_groups():
    method = make("grouped")
    value, gradient = value_and_gradient(
        lambda w: method.penalty(w, method.init_state(D_IN, D_SAE, CPU)), decoder()
    )
    assert value == 0.0
    assert not gradient.any()


# --- State ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REGISTRY)
def test_state_has_the_documented_shapes_and_keeps_them(name: str):
    method = make(name)
    initial = method.init_state(D_IN, D_SAE, CPU)
    assert {key: tuple(tensor.shape) for key, tensor in initial.items()} == STATE_SHAPES[name]
    trained = trained_state(method)
    for key, tensor in initial.items():
        assert (trained[key].shape, trained[key].dtype) == (tensor.shape, tensor.dtype)


@pytest.mark.parametrize("name", REGISTRY)
def test_two_half_batches_added_up_give_the_state_of_the_whole_batch(name: str):
    method = make(name)
    whole, halves = (method.init_state(D_IN, D_SAE, CPU) for _ in range(2))
    for step in range(2 * PERIOD + 1):
        acts, forget = activations(step), is_forget()
        method.update(whole, method.statistics(acts, forget, step), step)
        parts = [method.statistics(acts[r::2], forget[r::2], step) for r in range(2)]
        assert parts[0].keys() == parts[1].keys()
        summed = {key: parts[0][key] + parts[1][key] for key in parts[0]}
        method.update(halves, summed, step)
    assert all(torch.equal(whole[key], halves[key]) for key in whole)


@pytest.mark.parametrize("name", regrouping)
@pytest.mark.parametrize("period", [1, 5, 20])
def test_groups_change_at_multiples_of_the_period_only(name: str, period: int):
    method = make(name, group_update_period=period)
    state = method.init_state(D_IN, D_SAE, CPU)
    changed = []
    for step in range(3 * period + 1):
        before = {key: state[key].clone() for key in state.keys() - AVERAGES}
        observe(method, state, activations(step), step)
        if not all(torch.equal(state[key], before[key]) for key in before):
            changed.append(step)
    assert changed == [0, period, 2 * period, 3 * period]


@pytest.mark.parametrize("name", regrouping)
@pytest.mark.parametrize("period", [1, 7, 8, 16, 41])
def test_cofiring_is_the_moving_average_of_the_observed_batches(name: str, period: int):
    method = make(name, group_update_period=period, ema=0.8)
    state = method.init_state(D_IN, D_SAE, CPU)
    pairs = [(i, j) for i in range(D_SAE) for j in range(D_SAE)]
    average: dict[tuple[int, int], float] = {}
    for step in range(20):
        acts = activations(step, rows=16)
        observe(method, state, acts, step)
        if step % max(1, period // 8) == 0:
            fired = (acts > 0).tolist()
            for i, j in pairs:
                rate = sum(token[i] and token[j] for token in fired) / 16
                average[i, j] = 0.8 * average[i, j] + 0.2 * rate if step else rate
    for (i, j), expected in average.items():
        assert state["cofiring"][i, j].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", regrouping)
def test_the_same_batches_give_the_same_state_twice(name: str):
    first, second = (trained_state(make(name)) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def block_activations(step: int, blocks: Tensor, rows: int = 256) -> Tensor:
    """Each token fires one block of features, and the features of a block always together."""
    generator = torch.Generator().manual_seed(step)
    active = torch.randint(int(blocks.max()) + 1, (rows, 1), generator=generator)
    return (blocks[None, :] == active) * (0.5 + torch.rand(rows, len(blocks), generator=generator))


def same_partition(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a[:, None] == a[None, :], b[:, None] == b[None, :])


@pytest.mark.parametrize("seed", range(5))
def test_grouped_finds_planted_groups(seed: int):
    generator = torch.Generator().manual_seed(seed)
    planted = (torch.arange(40) % 4)[torch.randperm(40, generator=generator)]
    method = make("grouped", n_groups=4)
    state = method.init_state(D_IN, 40, CPU)
    for step in range(2 * PERIOD + 1):
        acts = block_activations(step, planted)
        drop = torch.rand(acts.shape, generator=generator) < 0.2  # features miss some tokens
        observe(method, state, acts.masked_fill(drop, 0.0), step)
    assert same_partition(state["groups"], planted)


def test_grouped_follows_when_the_groups_change():
    before, after = torch.arange(40) // 10, torch.arange(40) % 4
    method = make("grouped", n_groups=4, ema=0.5)
    state = method.init_state(D_IN, 40, CPU)
    for step in range(10 * PERIOD + 1):
        observe(method, state, block_activations(step, before if step < PERIOD else after), step)
    assert same_partition(state["groups"], after)


def test_grouped_works_when_most_features_never_fire():
    method = make("grouped", n_groups=4)
    state = method.init_state(D_IN, 40, CPU)
    blocks = torch.cat([torch.tensor([0, 0, 1, 1]), torch.full((36,), 99)])
    for step in range(PERIOD + 1):
        acts = block_activations(step, blocks[:4])
        observe(method, state, torch.cat([acts, torch.zeros(len(acts), 36)], 1), step)
    groups = state["groups"]
    assert groups[0] == groups[1] != groups[2] == groups[3]
    assert 0 <= groups.min() <= groups.max() < 4


def test_adaptive_allows_exactly_the_pairs_that_fire_together():
    blocks = torch.arange(D_SAE) % 3
    method = make("adaptive_orthogonal")
    state = method.init_state(16, D_SAE, CPU)
    for step in range(PERIOD + 1):
        observe(method, state, block_activations(step, blocks), step)
    together = blocks[:, None] == blocks[None, :]
    assert torch.equal(state["allowance"], together.float())
    shared = orthonormal(3, 16)[blocks]  # features of a block share one direction
    assert method.penalty(shared, state).item() == pytest.approx(0.0, abs=1e-12)
    others = orthonormal(4, 16)[torch.arange(D_SAE) % 4]  # sharing across blocks
    assert method.penalty(others, state).item() > 0.1


def test_the_allowance_is_the_share_of_the_rarer_features_tokens():
    # 0 fires on tokens 0-3, 1 on tokens 2-3 and 6-7, 2 never, 3 on token 3.
    acts = torch.zeros(10, 4)
    acts[0:4, 0] = acts[2:4, 1] = acts[6:8, 1] = acts[3, 3] = 1.0
    method = make("adaptive_orthogonal")
    state = method.init_state(D_IN, 4, CPU)
    observe(method, state, acts, step=0)
    wanted = torch.tensor(
        [[1.0, 0.5, 0.0, 1.0], [0.5, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0]]
    )
    torch.testing.assert_close(state["allowance"], wanted)


# --- What a method refuses ------------------------------------------------------------------------


@pytest.mark.parametrize("name", regrouping)
def test_a_period_longer_than_the_run_is_refused(name: str):
    method = make(name, group_update_period=100)
    method.check(d_sae=64, total_steps=100)
    with pytest.raises(ValueError, match=r"group_update_period 100 .*99 steps"):
        method.check(d_sae=64, total_steps=99)


@pytest.mark.parametrize("name", regrouping)
def test_too_many_features_for_a_table_of_pairs_are_refused(name: str):
    method = make(name)
    method.check(d_sae=8192, total_steps=1000)
    with pytest.raises(ValueError, match=r"d_sae 8193 .*8192"):
        method.check(d_sae=8193, total_steps=1000)


def test_more_groups_than_features_are_refused():
    method = make("grouped", n_groups=64)
    method.check(d_sae=64, total_steps=1000)
    with pytest.raises(ValueError, match=r"n_groups 64 .*d_sae 63"):
        method.check(d_sae=63, total_steps=1000)


@pytest.mark.parametrize("name", sorted(set(REGISTRY) - set(regrouping)))
def test_a_method_that_does_not_regroup_works_at_any_size(name: str):
    make(name).check(d_sae=100_000, total_steps=1)


@pytest.mark.parametrize("name", sorted(set(REGISTRY) - set(regrouping)))
def test_a_method_that_does_not_regroup_has_no_period(name: str):
    with pytest.raises(ValueError, match="group_update_period"):
        REGISTRY[name](group_update_period=10)


@pytest.mark.parametrize("name", regrouping)
@pytest.mark.parametrize(("field", "value"), [("group_update_period", 0), ("ema", 1.0)])
def test_parameters_out_of_bounds_are_refused(name: str, field: str, value: float):
    with pytest.raises(ValueError, match=field):
        make(name, {field: value})
