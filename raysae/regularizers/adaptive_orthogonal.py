"""Controlled feature sharing: features that fire together may share direction, the rest may not."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from raysae.products import matmul
from raysae.regularizers.base import OrthogonalityRegularizer, State, StepView
from raysae.regularizers.chunks import by_chunk, draw_chunks
from raysae.regularizers.cofiring import (
    cofiring_counts,
    is_observed,
    moving_average,
    normalised_cofiring,
)
from raysae.regularizers.gram import unit_rows
from raysae.regularizers.layout import layout
from raysae.regularizers.periodic import PeriodicRegularizer


class AdaptiveOrthogonal(PeriodicRegularizer, OrthogonalityRegularizer):
    """penalty = d_in · mean over i ≠ j of max(|cos(W_i, W_j)| − s_ij, 0)².

    The allowance s_ij in [0, 1] is the measured co-activation of features i and j (moving average
    of the co-firing count over that of the rarer feature), refreshed every `group_update_period`
    steps. Before the first refresh it is 0: nothing may be shared.

    An SAE wider than `chunk_size` is cut into random chunks, drawn anew at every refresh; pairs
    inside a chunk count, and their allowance is measured on the batch of the refresh, the only one
    that has seen them.

    Source: "controlled feature sharing" of the seed study (docs/seed_study.md), runs 1 (α = 0.1), 2
    (α = 0.05) and 5 (dynamic α), which gives no formula; chunks as in OrtSAE (arXiv 2509.22033). It
    departs from a mean over all pairs where an SAE is wider than a chunk.
    """

    name: ClassVar[str] = "adaptive_orthogonal"
    searchable: ClassVar[frozenset[str]] = PeriodicRegularizer.searchable | {"ema", "chunk_size"}

    ema: float = Field(0.9, ge=0.0, lt=1.0, description="weight of the past, per observation")
    chunk_size: int = Field(1024, ge=2, description="features a chunk, at most")

    def init_state(self, d_in: int, d_sae: int, device: torch.device) -> State:
        chunks = draw_chunks(d_sae, self.chunk_size, 0)
        count, size = int(chunks.max()) + 1, int(torch.bincount(chunks).max())
        return {
            "chunks": chunks.to(device),
            "cofiring": torch.zeros(count, size, size, device=device),
            "observations": torch.zeros((), dtype=torch.long, device=device),
            "allowance": torch.zeros(count, size, size, device=device),
        }

    def kind(self, step: int) -> str | None:
        if self.is_update(step):
            return None
        return "observed" if is_observed(step, self.group_update_period) else "plain"

    def statistics(self, view: StepView, state: State, step: int) -> State:
        if not is_observed(step, self.group_update_period):
            return {}
        chunks = state["chunks"]
        if len(state["cofiring"]) > 1:
            if not self.is_update(step):
                return {}
            fired = (view.acts > 0).to(torch.float32).T
            fired = by_chunk(fired, self._chunks(len(fired), step).to(chunks.device))
            cofiring = matmul(fired, fired.transpose(1, 2))
        else:
            cofiring = cofiring_counts(view.activations)[None]
        return {"cofiring": cofiring, "tokens": view.tokens}

    def update(self, state: State, statistics: State, W_dec: Tensor, step: int) -> None:
        if statistics:
            if len(state["cofiring"]) > 1:
                state["chunks"].copy_(self._chunks(len(W_dec), step))
                state["observations"].zero_()
            rate = statistics["cofiring"] / statistics["tokens"]
            moving_average(state["cofiring"], rate, state["observations"], self.ema)
            state["observations"] += 1
        if self.is_update(step):
            state["allowance"].copy_(normalised_cofiring(state["cofiring"]))

    def decoder_penalty(self, W_dec: Tensor, state: State) -> Tensor:
        pairs = max(1, layout(state["chunks"]).pairs_within)
        U = by_chunk(unit_rows(W_dec), state["chunks"])
        total: Tensor = _SquaredExcess.apply(U, state["allowance"])
        return total * W_dec.shape[1] / pairs

    def _chunks(self, d_sae: int, step: int) -> Tensor:
        return draw_chunks(d_sae, self.chunk_size, step)


class _SquaredExcess(torch.autograd.Function):
    """Σ over i ≠ j of max(|u_i·u_j| − s_ij, 0)², for U (chunks, n, d_in) and a symmetric s.

    With E the excess times the cosine's sign, symmetric as well, its gradient is 4 E U: one product
    instead of autograd's two.
    """

    @staticmethod
    def forward(ctx: Any, U: Tensor, allowance: Tensor) -> Tensor:
        cosines = matmul(U, U.transpose(1, 2))
        # i = j: cos is 1 by construction and carries no gradient worth having.
        cosines.diagonal(dim1=1, dim2=2).zero_()
        allowed = allowance.to(cosines.dtype)
        excess = cosines - cosines.clamp(-allowed, allowed)
        ctx.save_for_backward(U, excess)
        return excess.pow(2).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        U, excess = ctx.saved_tensors
        return matmul(excess, U).mul_(4 * grads[0]), None
