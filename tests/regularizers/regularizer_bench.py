"""Decoders, batches and states on which every regularizer is tested."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from raysae.regularizers import REGISTRY, Regularizer, State, StepView

CPU = torch.device("cpu")
D_IN, D_SAE, PERIOD, ROWS = 7, 12, 5, 64
"""D_SAE is the size of no other axis, so an axis of that size is an axis of features."""

N_GROUPS = 4
SMALL = {
    "group_update_period": PERIOD,
    "n_groups": N_GROUPS,
    "n_super_groups": 2,
    "subspace_rank": 3,
    "observe_every": 2,
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in REGISTRY] + [
    ("ortsae_chunked", {"chunk_size": 5}),
    ("adaptive_orthogonal", {"chunk_size": 5}),
    ("grouped", {"scope": "within"}),
    ("task_masked", {"threshold": 0.0}),
]
every_method = pytest.mark.parametrize(
    ("name", "parameters"), VARIANTS, ids=lambda v: v if isinstance(v, str) else str(v or "")
)
periodic = [n for n in REGISTRY if "group_update_period" in REGISTRY[n].searchable]
with_cofiring = [n for n in periodic if "ema" in REGISTRY[n].searchable and n != "task_masked"]
grouping = [n for n in REGISTRY if "n_groups" in REGISTRY[n].searchable]


def make(name: str, parameters: dict[str, Any] | None = None, **more: Any) -> Any:
    """The method with small parameters, as far as it has them."""
    known = REGISTRY[name].model_fields
    small = {key: value for key, value in (SMALL | more).items() if key in known}
    return REGISTRY[name](**(small | (parameters or {})))


# --- Decoders and batches -------------------------------------------------------------------------


def decoder(n: int = D_SAE, d_in: int = D_IN, seed: int = 0) -> Tensor:
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(n: int, d_in: int) -> Tensor:
    return torch.linalg.qr(decoder(d_in, d_in))[0][:n]


def activations(step: int, is_forget: Tensor, d_sae: int = D_SAE) -> Tensor:
    """(rows, d_sae) ≥ 0: features i mod 4 fire partly together, two of the four on either task."""
    generator = torch.Generator().manual_seed(1000 + step)
    rows = len(is_forget)
    on_forget, on_retain = torch.tensor([0.7, 0.1, 0.4, 0.5]), torch.tensor([0.1, 0.7, 0.4, 0.3])
    rate = torch.where(is_forget[:, None], on_forget, on_retain)
    drivers = torch.rand(rows, 4, generator=generator) < rate
    noise = torch.rand(rows, d_sae, generator=generator)
    fires = drivers[:, torch.arange(d_sae) % 4] & (noise < torch.linspace(0.3, 1.0, d_sae))
    return fires * (0.5 + noise)


def every_third(rows: int = ROWS) -> Tensor:
    return torch.arange(rows) % 3 == 0


def forget_tokens(step: int, rows: int = ROWS) -> Tensor:
    """About a third, unevenly spread over the batch and another number in each."""
    generator = torch.Generator().manual_seed(2000 + step)
    return torch.rand(rows, generator=generator) < torch.linspace(0.05, 0.6, rows)


def view_of(W: Tensor, acts: Tensor, is_forget: Tensor, seed: int = 0) -> StepView:
    """In the decoder's dtype, with some error."""
    error = decoder(len(acts), W.shape[1], seed=seed + 99)
    return StepView(W, acts.to(W.dtype), is_forget, error.to(W.dtype))


def view(step: int, W: Tensor | None = None) -> StepView:
    """The usual batch of that step, float64."""
    W = decoder() if W is None else W
    is_forget = forget_tokens(step)
    return view_of(W, activations(step, is_forget), is_forget, seed=step)


def cast(v: StepView, dtype: torch.dtype) -> StepView:
    return StepView(v.W_dec.to(dtype), v.acts.to(dtype), v.is_forget, v.error.to(dtype))


def rows_of(v: StepView, rows: slice) -> StepView:
    """What a data-parallel worker sees of the batch."""
    return StepView(v.W_dec, v.acts[rows], v.is_forget[rows], v.error[rows])


def one_task_each(n: int, W: Tensor, rows: int = 256, seed: int = 0) -> StepView:
    """`N_GROUPS` blocks that fire one at a time, even ones on forget tokens, odd on retain."""
    generator = torch.Generator().manual_seed(seed)
    is_forget = torch.arange(rows) % 2 == 0
    half = torch.randint(N_GROUPS // 2, (rows,), generator=generator)
    active = 2 * half + (~is_forget).long()
    fires = (torch.arange(n) % N_GROUPS)[None, :] == active[:, None]
    return view_of(W, fires * (0.5 + torch.rand(rows, n, generator=generator)), is_forget, seed)


# --- States ---------------------------------------------------------------------------------------


def observe(method: Regularizer, state: State, v: StepView, step: int) -> None:
    """What a training step does before the penalty, with the dtypes that it has."""
    v = cast(v.detach(), torch.float32)
    method.update(state, method.statistics(v, state, step), v.W_dec, step)


def trained_state(
    method: Regularizer,
    views: Callable[[int], StepView] = view,
    steps: int = 2 * PERIOD + 2,
) -> State:
    """After some batches; the last is `views(steps - 1)`."""
    d_sae, d_in = views(0).W_dec.shape
    state = method.init_state(d_in, d_sae, CPU)
    for step in range(steps):
        observe(method, state, views(step), step)
    return state


LAST = 2 * PERIOD + 1
"""The last step of a `trained_state`."""


def exact(state: State) -> State:
    """In float64, so that rounding of the state hides nothing."""
    return {k: v.double() if v.is_floating_point() else v for k, v in state.items()}


def clone(state: State) -> State:
    return {key: tensor.clone() for key, tensor in state.items()}


def permuted_state(state: State, order: Tensor) -> State:
    """The state after feature j became what feature `order[j]` was."""
    permuted = {}
    for key, tensor in state.items():
        for axis, size in enumerate(tensor.shape):
            if size == D_SAE:
                tensor = tensor.index_select(axis, order)
        permuted[key] = tensor
    if "allowance" in state:  # (chunks, size, size), in the order of the features in a chunk
        place, new_place = places(state["chunks"]), places(permuted["chunks"])
        for key in ("allowance", "cofiring"):
            permuted[key] = torch.zeros_like(state[key])
            for a in range(D_SAE):
                for b in range(D_SAE):
                    (c, i), (d, j) = new_place[a], new_place[b]
                    (_, old_i), (_, old_j) = place[int(order[a])], place[int(order[b])]
                    if c == d:
                        permuted[key][c, i, j] = state[key][c, old_i, old_j]
    return permuted


def places(chunks: Tensor) -> list[tuple[int, int]]:
    """Chunk of every feature, and its place in the order of the chunk's features."""
    labels = chunks.tolist()
    return [(label, labels[:i].count(label)) for i, label in enumerate(labels)]


# --- Values ---------------------------------------------------------------------------------------

Penalty = Callable[[StepView], Tensor]


def value_and_gradients(penalty: Penalty, v: StepView) -> tuple[float, Tensor, Tensor]:
    """The penalty and its gradients with respect to decoder and activations."""
    W = v.W_dec.detach().clone().requires_grad_()
    acts = v.acts.detach().clone().requires_grad_()
    value = penalty(StepView(W, acts, v.is_forget, v.error))
    if value.requires_grad:
        value.backward()
    return (
        value.item(),
        torch.zeros_like(W) if W.grad is None else W.grad,
        torch.zeros_like(acts) if acts.grad is None else acts.grad,
    )


def same_partition(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a[:, None] == a[None, :], b[:, None] == b[None, :])
