"""Every penalty as loops over features, pairs and tokens; nothing shared with the implementation.

A new method needs a line in `REFERENCES` and one in `STATE_SHAPES`: tests fail until it has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from regularizer_bench import D_IN, D_SAE, N_GROUPS
from torch import Tensor

from raysae.regularizers import State, StepView

FORGET, RETAIN = 1, 2


def cosine(W: Tensor, i: int, j: int) -> Tensor:
    return (W[i] * W[j]).sum() / (W[i].pow(2).sum().sqrt() * W[j].pow(2).sum().sqrt())


def mean_over(pairs: list[Tensor], W: Tensor) -> Tensor:
    """d_in · mean of the pairs' terms; 0 without pairs."""
    return W.shape[1] * torch.stack(pairs).mean() if pairs else W.sum() * 0


def ordered_pairs(W: Tensor) -> list[tuple[int, int]]:
    return [(i, j) for i in range(len(W)) for j in range(len(W)) if i != j]


def none(_method: Any, v: StepView, _state: State) -> Tensor:
    return v.W_dec.sum() * 0


def fixed_orthogonal(_method: Any, v: StepView, _state: State) -> Tensor:
    W = v.W_dec
    return mean_over([cosine(W, i, j) ** 2 for i, j in ordered_pairs(W)], W)


def ortsae_chunked(_method: Any, v: StepView, state: State) -> Tensor:
    W, label = v.W_dec, state["chunks"].tolist()
    largest = max(label.count(chunk) for chunk in label)
    terms = []
    for i in range(len(W)):
        rivals = [cosine(W, i, j) for j in range(len(W)) if j != i and label[j] == label[i]]
        nearest = max(rivals, key=lambda c: c.item())
        terms.append(nearest**2 if nearest > 0 else nearest * 0)
    return W.shape[1] / (2 * math.log(largest)) * torch.stack(terms).mean()


def adaptive_orthogonal(_method: Any, v: StepView, state: State) -> Tensor:
    W, label = v.W_dec, state["chunks"].tolist()
    place = [label[:i].count(label[i]) for i in range(len(W))]
    terms = []
    for i, j in ordered_pairs(W):
        if label[i] == label[j]:
            allowed = state["allowance"][label[i], place[i], place[j]]
            excess = abs(cosine(W, i, j)) - allowed
            terms.append(excess**2 if excess > 0 else excess * 0)
    return mean_over(terms, W)


def grouped(method: Any, v: StepView, state: State) -> Tensor:
    W, label = v.W_dec, state["groups"].tolist()
    counted = [
        (i, j) for i, j in ordered_pairs(W) if (label[i] == label[j]) == (method.scope == "within")
    ]
    return mean_over([cosine(W, i, j) ** 2 for i, j in counted], W)


def task_masked(method: Any, v: StepView, state: State) -> Tensor:
    W, label, forget = v.W_dec, state["groups"].tolist(), v.is_forget.tolist()
    terms = [
        cosine(W, i, j) ** 2
        for i, j in ordered_pairs(W)
        if label[i] == FORGET and label[j] == RETAIN
    ]
    leaks = []
    for i in range(len(W)):
        if label[i] in (FORGET, RETAIN):
            own = 0 if label[i] == FORGET else 1
            others = [v.acts[t, i] for t in range(len(forget)) if forget[t] == (own == 1)]
            leaks.append(torch.stack(others).mean() / state["activation"][own, i])
    leak = torch.stack(leaks).mean() if leaks else W.sum() * 0
    return mean_over(terms, W) + method.leak_weight * leak


def weighted(v: StepView, weights: list[float]) -> Tensor:
    W, mean = v.W_dec, sum(weights) / len(weights)
    terms = [
        weights[i] / mean * weights[j] / mean * cosine(W, i, j) ** 2 for i, j in ordered_pairs(W)
    ]
    return mean_over(terms, W)


def importance(_method: Any, v: StepView, state: State) -> Tensor:
    return weighted(v, state["importance"].tolist())


def gradient_disentangled(_method: Any, v: StepView, state: State) -> Tensor:
    return weighted(v, state["agreement"].tolist())


def hierarchical(_method: Any, v: StepView, state: State) -> Tensor:
    W, beta = v.W_dec, state["beta"].item()
    group, super_group = state["groups"].tolist(), state["super_groups"].tolist()
    pairs = ordered_pairs(W)
    within = [cosine(W, i, j) ** 2 for i, j in pairs if group[i] == group[j]]
    between = [cosine(W, i, j) ** 2 for i, j in pairs if super_group[i] != super_group[j]]
    return beta * mean_over(within, W) + (1 - beta) * mean_over(between, W)


def subspace_clustered(method: Any, v: StepView, state: State) -> Tensor:
    W, group = v.W_dec, state["groups"].tolist()
    bases = [[q for q in basis if q.abs().sum() > 0] for basis in state["bases"]]
    existing = [a for a in range(len(bases)) if bases[a]]
    terms = []
    for a in existing:
        for b in existing:
            if a == b:
                continue
            energies = [
                sum(((q * W[i]).sum() / W[i].pow(2).sum().sqrt()) ** 2 for q in bases[b])
                for i in range(len(W))
                if group[i] == a
            ]
            mean = sum(energies) / len(energies) / len(bases[b])
            terms.append(state["strength"][a, b] * mean)
    return 0.5 * mean_over(terms, W) + 0.5 * hierarchical(method, v, state)


def cross_task_inhibition(_method: Any, v: StepView, state: State) -> Tensor:
    forget = v.is_forget.tolist()
    on_forget, on_retain = state["firing_rate"].tolist()
    total = v.W_dec.sum() * 0
    for i in range(v.acts.shape[1]):
        tau = state["threshold"][i].item()
        belongs_to_forget = on_forget[i] >= on_retain[i]
        others = [v.acts[t, i] for t in range(len(forget)) if forget[t] != belongs_to_forget]
        excesses = [((a - tau) / tau) ** 2 if a > tau else a * 0 for a in others]
        if tau > 0:
            total = total + torch.stack(excesses).mean()
    return 0.5 * total / state["l0"].item()


REFERENCES: dict[str, Callable[[Any, StepView, State], Tensor]] = {
    "none": none,
    "fixed_orthogonal": fixed_orthogonal,
    "ortsae_chunked": ortsae_chunked,
    "adaptive_orthogonal": adaptive_orthogonal,
    "grouped": grouped,
    "task_masked": task_masked,
    "importance": importance,
    "hierarchical": hierarchical,
    "cross_task_inhibition": cross_task_inhibition,
    "gradient_disentangled": gradient_disentangled,
    "subspace_clustered": subspace_clustered,
}

_GROUPING = {
    "cofiring": (D_SAE, D_SAE),
    "observations": (),
    "groups": (D_SAE,),
    "centroids": (N_GROUPS, D_SAE),
}
_HIERARCHICAL = _GROUPING | {"super_groups": (D_SAE,), "beta": ()}
_TASK_RATES = {
    "firing_rate": (2, D_SAE),
    "activation": (2, D_SAE),
    "task_share": (2,),
    "observations": (),
}

STATE_SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "none": {},
    "fixed_orthogonal": {},
    "ortsae_chunked": {"chunks": (D_SAE,)},
    "adaptive_orthogonal": {
        "chunks": (D_SAE,),
        "cofiring": (1, D_SAE, D_SAE),
        "observations": (),
        "allowance": (1, D_SAE, D_SAE),
    },
    "grouped": _GROUPING,
    "task_masked": _TASK_RATES | {"groups": (D_SAE,)},
    "importance": {"importance": (D_SAE,), "observations": ()},
    "hierarchical": _HIERARCHICAL,
    "cross_task_inhibition": _TASK_RATES | {"threshold": (D_SAE,), "l0": ()},
    "gradient_disentangled": {"agreement": (D_SAE,), "observations": ()},
    "subspace_clustered": _HIERARCHICAL
    | {"bases": (N_GROUPS, 3, D_IN), "strength": (N_GROUPS, N_GROUPS)},
}
