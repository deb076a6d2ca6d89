"""Features that carry much of the reconstruction are pushed apart hardest."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from raysae.regularizers.base import OrthogonalityRegularizer, State, StepView
from raysae.regularizers.cofiring import moving_average
from raysae.regularizers.gram import unit_rows, weighted_mean_squared_cosine


class Importance(OrthogonalityRegularizer):
    """penalty = d_in · mean over i ≠ j of w_i w_j cos²(W_i, W_j).

    w = importance scaled to mean 1; importance_i = moving average of the mean of
    acts_i² · ‖W_dec,i‖², the reconstruction energy that feature i carries.

    Source: importance weighting of the seed study (docs/seed_study.md), run 6, which gives no
    formula.
    """

    name: ClassVar[str] = "importance"
    searchable: ClassVar[frozenset[str]] = frozenset({"ema"})

    ema: float = Field(0.99, ge=0.0, lt=1.0, description="weight of the past, per step")

    def init_state(self, d_in: int, d_sae: int, device: torch.device) -> State:
        return {
            "importance": torch.ones(d_sae, device=device),
            "observations": torch.zeros((), dtype=torch.long, device=device),
        }

    def statistics(self, view: StepView, state: State, step: int) -> State:
        acts = view.activations
        squares = acts.sum_by_task(acts.values.pow(2), view.is_forget).sum(0)
        return {
            "energy": squares.float() * view.W_dec.pow(2).sum(1).float(),
            "tokens": view.tokens,
        }

    def update(self, state: State, statistics: State, W_dec: Tensor, step: int) -> None:
        energy = statistics["energy"] / statistics["tokens"]
        moving_average(state["importance"], energy, state["observations"], self.ema)
        state["observations"] += 1

    def decoder_penalty(self, W_dec: Tensor, state: State) -> Tensor:
        weights = mean_one(state["importance"]).to(W_dec.dtype)
        return weighted_mean_squared_cosine(unit_rows(W_dec), weights)


def mean_one(weights: Tensor) -> Tensor:
    """Weights (n,), at least 0, scaled to mean 1; all zero if none is positive."""
    mean = weights.mean()
    return torch.where(mean > 0, weights / mean.clamp_min(1e-30), weights)
