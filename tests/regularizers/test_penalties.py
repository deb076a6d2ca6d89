"""Every regularizer against naive loops in float64, and the laws that all penalties obey.

The tests run over `REGISTRY`: a new method is tested as soon as it is registered, and fails here
until `REFERENCES` and `STATE_SHAPES` say what it should compute and keep.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from regularizer_bench import (
    CPU,
    D_SAE,
    LAST,
    N_GROUPS,
    ROWS,
    VARIANTS,
    cast,
    clone,
    decoder,
    every_method,
    exact,
    make,
    one_task_each,
    orthonormal,
    permuted_state,
    rows_of,
    trained_state,
    value_and_gradients,
    view,
    view_of,
)
from regularizer_references import FORGET, REFERENCES, RETAIN, STATE_SHAPES
from torch import Tensor

from raysae.regularizers import REGISTRY, Regularizer, State, StepView

LOOKS_AT_ACTIVATIONS = {"task_masked", "cross_task_inhibition"}
decoder_methods = [name for name in REGISTRY if name not in ("none", "cross_task_inhibition")]


def test_every_method_has_a_reference_and_a_documented_state():
    for name in REGISTRY:
        assert name in REFERENCES, f"write a naive reference of {name!r} in REFERENCES"
        assert name in STATE_SHAPES, f"list the state tensors of {name!r} in STATE_SHAPES"


# --- Values and gradients -------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_value_and_gradients_equal_the_naive_loops(name: str, parameters: dict, seed: int):
    method = make(name, parameters)
    state = exact(trained_state(method))
    v = view(LAST, decoder(seed=seed))
    value, *gradients = value_and_gradients(lambda v: method.penalty(v, state), v)
    wanted, *wanted_gradients = value_and_gradients(lambda v: REFERENCES[name](method, v, state), v)
    assert value == pytest.approx(wanted, rel=1e-10)
    torch.testing.assert_close(gradients, wanted_gradients, rtol=1e-9, atol=1e-12)
    # The comparison is worth something only where there is something to compare.
    assert (value > 0) == REGISTRY[name].uses_alpha
    assert bool(gradients[0].any()) == (name in decoder_methods)
    assert bool(gradients[1].any()) == (name in LOOKS_AT_ACTIVATIONS)


@every_method
def test_value_equals_the_naive_loops_before_the_first_update(name: str, parameters: dict):
    method, v = make(name, parameters), view(0)
    state = exact(method.init_state(*v.W_dec.T.shape, CPU))
    value = method.penalty(v, state)
    assert value.item() == pytest.approx(REFERENCES[name](method, v, state).item(), rel=1e-10)


@every_method
def test_float32_is_good_enough_to_train_with(name: str, parameters: dict):
    method, v = make(name, parameters), view(LAST)
    state = trained_state(method)
    wanted, *wanted_gradients = value_and_gradients(lambda v: method.penalty(v, exact(state)), v)
    value, *gradients = value_and_gradients(
        lambda v: method.penalty(v, state), cast(v, torch.float32)
    )
    assert value == pytest.approx(wanted, rel=1e-5)
    for gradient, wanted_gradient in zip(gradients, wanted_gradients, strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=1e-4, atol=1e-6)


# --- Invariances ----------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("seed", [0, 1])
def test_permuting_features_and_state_together_changes_nothing(
    name: str, parameters: dict, seed: int
):
    method, v = make(name, parameters), view(LAST)
    state = exact(trained_state(method))
    order = torch.randperm(D_SAE, generator=torch.Generator().manual_seed(seed))
    permuted = permuted_state(state, order)
    moved = StepView(v.W_dec[order], v.acts[:, order], v.is_forget, v.error)
    value, of_W, of_acts = value_and_gradients(lambda v: method.penalty(v, state), v)
    same, of_moved_W, of_moved_acts = value_and_gradients(
        lambda v: method.penalty(v, permuted), moved
    )
    assert same == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(of_moved_W, of_W[order])
    torch.testing.assert_close(of_moved_acts, of_acts[:, order])


@pytest.mark.parametrize(
    ("name", "parameters"), [variant for variant in VARIANTS if variant[0] in decoder_methods]
)
def test_scaling_decoder_rows_changes_nothing(name: str, parameters: dict):
    method, v = make(name, parameters), view(LAST)
    state = trained_state(method)
    lengths = torch.logspace(-3, 3, D_SAE, dtype=torch.float64)[:, None]
    scaled = StepView(v.W_dec * lengths, v.acts, v.is_forget, v.error)
    value = method.penalty(v, state).item()
    assert value > 0
    assert method.penalty(scaled, state).item() == pytest.approx(value, rel=1e-12)


# --- What costs nothing, something, and one -------------------------------------------------------


@every_method
@pytest.mark.parametrize("d_in", [D_SAE, D_SAE + 4])
def test_orthonormal_features_that_keep_to_their_task_cost_nothing(
    name: str, parameters: dict, d_in: int
):
    method, W = make(name, parameters), orthonormal(D_SAE, d_in)
    state = trained_state(method, lambda step: one_task_each(D_SAE, W, seed=step))
    value = method.penalty(one_task_each(D_SAE, W, seed=LAST), state).item()
    assert value == pytest.approx(0.0, abs=1e-12)


def features(first: float, second: float, others: float) -> Tensor:
    """A value for each feature: those of the duplicated pair, and the rest's."""
    return torch.tensor([first, second] + [others] * (D_SAE - 2))


ALLOWED = torch.zeros(1, D_SAE, D_SAE)
ALLOWED[0, 0, 1] = ALLOWED[0, 1, 0] = 1.0
EQUAL = torch.ones(N_GROUPS, N_GROUPS) - torch.eye(N_GROUPS)
# Groups 0 and 1 make up one super-group, 2 and 3 the other.
SUPER = {"groups": features(0, 1, 2), "super_groups": features(0, 0, 1)}

COUNTED: list[tuple[str, dict[str, Any], State]] = [
    ("fixed_orthogonal", {}, {}),
    ("ortsae_chunked", {}, {}),
    ("ortsae_chunked", {"chunk_size": 6}, {"chunks": torch.arange(12) // 6}),
    ("adaptive_orthogonal", {}, {}),
    ("adaptive_orthogonal", {"chunk_size": 6}, {"chunks": torch.arange(12) // 6}),
    ("grouped", {"scope": "between"}, {"groups": features(0, 1, 2)}),
    ("grouped", {"scope": "within"}, {"groups": features(0, 0, 1)}),
    ("task_masked", {}, {"groups": features(FORGET, RETAIN, 0)}),
    ("importance", {}, {"importance": features(1, 2, 0.5)}),
    ("gradient_disentangled", {}, {"agreement": features(1, 0.5, 0)}),
    ("hierarchical", {}, {"groups": features(1, 1, 0)}),
    ("hierarchical", {}, {"groups": features(0, 2, 0), "super_groups": features(0, 1, 0)}),
    ("subspace_clustered", {}, SUPER | {"strength": EQUAL}),
]
FREE: list[tuple[str, dict[str, Any], State]] = [
    ("ortsae_chunked", {"chunk_size": 6}, {"chunks": torch.arange(12) % 2}),
    ("adaptive_orthogonal", {}, {"allowance": ALLOWED}),
    ("adaptive_orthogonal", {"chunk_size": 6}, {"chunks": torch.arange(12) % 2}),
    ("grouped", {"scope": "between"}, {"groups": features(0, 0, 1)}),
    ("grouped", {"scope": "within"}, {"groups": features(0, 1, 2)}),
    ("task_masked", {}, {"groups": features(FORGET, FORGET, RETAIN)}),
    ("task_masked", {}, {"groups": features(0, RETAIN, FORGET)}),
    ("importance", {}, {"importance": features(1, 0, 1)}),
    ("gradient_disentangled", {}, {"agreement": features(0, 0, 1)}),
    ("hierarchical", {}, SUPER),
    ("subspace_clustered", {}, SUPER | {"strength": EQUAL * 0}),
]


def cost_of_a_duplicate(name: str, parameters: dict[str, Any], changes: State) -> float:
    """Of an orthonormal decoder whose second row is the first, in a state that we choose."""
    W = orthonormal(D_SAE, 16)
    W[1] = W[0]
    method = make(name, parameters)
    state = method.init_state(16, D_SAE, CPU)
    if "bases" in state:
        for feature, group in enumerate(changes["groups"].long()[:3]):
            state["bases"][group, 0] = W[feature]
    for key, tensor in changes.items():
        state[key].copy_(tensor)
    silent = view_of(W, torch.zeros(ROWS, D_SAE), torch.arange(ROWS) % 2 == 0)
    return method.penalty(silent, state).item()


def test_a_duplicate_is_tried_on_every_method_that_looks_at_the_decoder():
    assert {name for name, _, _ in COUNTED} == set(decoder_methods)
    assert {name for name, _, _ in FREE} == set(decoder_methods) - {"fixed_orthogonal"}


@pytest.mark.parametrize(("name", "parameters", "changes"), COUNTED)
def test_a_duplicated_pair_that_counts_costs_something(name: str, parameters: dict, changes: State):
    assert cost_of_a_duplicate(name, parameters, changes) > 0.1


@pytest.mark.parametrize(("name", "parameters", "changes"), FREE)
def test_a_duplicated_pair_that_does_not_count_is_free(name: str, parameters: dict, changes: State):
    assert cost_of_a_duplicate(name, parameters, changes) == pytest.approx(0.0, abs=1e-12)


COST_OF_RANDOM = {"ortsae_chunked": (0.55, 1.0), "adaptive_orthogonal": (0.68, 0.82)}
"""Where it is not 0.9 to 1.1. The largest of a few hundred cosines is below its asymptote; a
quarter of the pairs here fire together and are allowed everything."""


@pytest.mark.parametrize("name", decoder_methods)
@pytest.mark.parametrize(("d_in", "n"), [(16, 256), (64, 512), (128, 96), (32, 1024)])
def test_random_directions_cost_one_at_any_size(name: str, d_in: int, n: int):
    method, v = make(name), one_task_each(n, decoder(n, d_in))
    state = trained_state(method, lambda _: v, steps=1)
    if "importance" in state or "agreement" in state:  # another weight for every feature
        weights = 0.5 + torch.rand(n, generator=torch.Generator().manual_seed(0))
        state["agreement" if "agreement" in state else "importance"].copy_(weights)
    low, high = COST_OF_RANDOM.get(name, (0.9, 1.1))
    assert low < method.penalty(v, state).item() < high


# --- Data-parallel --------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("step", [LAST, LAST + 1])
def test_the_mean_over_two_workers_is_the_whole_batchs_penalty(
    name: str, parameters: dict, step: int
):
    method, v = make(name, parameters), view(step)
    state = exact(trained_state(method, steps=step + 1))
    halves = [rows_of(v, slice(0, ROWS // 2)), rows_of(v, slice(ROWS // 2, ROWS))]
    assert halves[0].is_forget.sum() != halves[1].is_forget.sum()
    whole, of_W, of_acts = value_and_gradients(lambda v: method.penalty(v, state), v)
    parts = [value_and_gradients(lambda v: method.penalty(v, state), half) for half in halves]
    assert sum(part[0] for part in parts) / 2 == pytest.approx(whole, rel=1e-6)
    torch.testing.assert_close((parts[0][1] + parts[1][1]) / 2, of_W, rtol=1e-9, atol=1e-12)
    of_both = torch.cat([parts[0][2], parts[1][2]]) / 2
    torch.testing.assert_close(of_both, of_acts, rtol=1e-6, atol=1e-12)


# --- Awkward batches ------------------------------------------------------------------------------


def zero_row(v: StepView) -> StepView:
    W = v.W_dec.clone()
    W[3] = 0
    return StepView(W, v.acts, v.is_forget, v.error)


def no_forget_token(v: StepView) -> StepView:
    return StepView(v.W_dec, v.acts, torch.zeros_like(v.is_forget), v.error)


def only_forget_tokens(v: StepView) -> StepView:
    return StepView(v.W_dec, v.acts, torch.ones_like(v.is_forget), v.error)


def most_features_never_fire(v: StepView) -> StepView:
    return StepView(v.W_dec, v.acts * (torch.arange(D_SAE) < 3), v.is_forget, v.error)


def nothing_fires(v: StepView) -> StepView:
    return StepView(v.W_dec, v.acts * 0, v.is_forget, v.error)


@every_method
@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
@pytest.mark.parametrize("before", ["always", "late"])
@pytest.mark.parametrize(
    "awkward",
    [zero_row, no_forget_token, only_forget_tokens, most_features_never_fire, nothing_fires],
)
def test_awkward_batches_give_finite_states_values_and_gradients(
    name: str, parameters: dict, awkward: Callable[[StepView], StepView], before: str
):
    method = make(name, parameters)
    late = LAST - 1 if before == "late" else 0  # an update, after usual batches or at once

    def views(step: int) -> StepView:
        return awkward(view(step)) if step >= late else view(step)

    state = trained_state(method, views)
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    v = cast(views(LAST), torch.float32)
    value, *gradients = value_and_gradients(lambda v: method.penalty(v, state), v)
    assert torch.isfinite(torch.tensor(value))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@every_method
def test_the_penalty_does_not_touch_the_state(name: str, parameters: dict):
    method = make(name, parameters)
    state = trained_state(method)
    before = clone(state)
    value_and_gradients(lambda v: method.penalty(v, state), view(LAST))
    assert state.keys() == before.keys()
    assert all(torch.equal(state[key], before[key]) for key in before)


def test_one_group_has_no_pairs_between_groups():
    method: Regularizer = make("grouped")
    state = method.init_state(*view(0).W_dec.T.shape, CPU)
    value, of_W, _ = value_and_gradients(lambda v: method.penalty(v, state), view(0))
    assert value == 0.0
    assert not of_W.any()
