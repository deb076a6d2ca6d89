"""Features that both tasks pull the same way are pushed apart hardest."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from raysae.errors import FieldError
from raysae.regularizers.base import OrthogonalityRegularizer, State, StepView
from raysae.regularizers.cofiring import moving_average
from raysae.regularizers.gram import unit_rows, weighted_mean_squared_cosine
from raysae.regularizers.importance import mean_one


class GradientDisentangled(OrthogonalityRegularizer):
    """penalty = d_in · mean over i ≠ j of w_i w_j cos²(W_i, W_j), w = agreement scaled to mean 1.

    agreement_i = moving average of max(cos(g_i^F, g_i^R), 0), with g_i^F and g_i^R the gradients of
    the squared reconstruction error of the batch's forget and retain tokens with respect to
    W_dec,i. For a linear decoder they are actsᵀ · error (up to a factor): no second backward pass.
    One step in `observe_every` is looked at. Before the first, all features weigh the same.

    Source: gradient disentanglement of the seed study (docs/seed_study.md), run 9, which gives no
    formula. It departs from plain agreements as weights: they are scaled to mean 1, so that α keeps
    its meaning while agreement falls.
    """

    name: ClassVar[str] = "gradient_disentangled"
    searchable: ClassVar[frozenset[str]] = frozenset({"ema", "observe_every"})

    ema: float = Field(0.9, ge=0.0, lt=1.0, description="weight of the past, per observation")
    observe_every: int = Field(8, ge=1, description="steps between two looks at the gradients")

    def check(self, architecture: str, d_sae: int, total_steps: int) -> None:
        if architecture.startswith("matryoshka"):
            raise ValueError(
                f"{self.name} cannot work on {architecture}: its reconstruction loss sums over "
                "nested prefixes, and the gradients' closed form covers the whole SAE's alone; "
                "use batchtopk, or another regularizer"
            )
        if self.observe_every > total_steps:
            raise FieldError(
                "observe_every",
                f"observe_every {self.observe_every} is longer than the run ({total_steps} steps): "
                "only the first step's gradients would be looked at",
            )

    def init_state(self, d_in: int, d_sae: int, device: torch.device) -> State:
        return {
            "agreement": torch.ones(d_sae, device=device),
            "observations": torch.zeros((), dtype=torch.long, device=device),
        }

    def kind(self, step: int) -> str | None:
        return "plain" if step % self.observe_every else "observed"

    def statistics(self, view: StepView, state: State, step: int) -> State:
        if step % self.observe_every:
            return {}
        acts, forget = view.activations, view.is_forget.to(view.error.dtype)[:, None]
        return {
            "forget_gradient": acts.transposed_product(acts.values, view.error * forget),
            "retain_gradient": acts.transposed_product(acts.values, view.error * (1 - forget)),
        }

    def update(self, state: State, statistics: State, W_dec: Tensor, step: int) -> None:
        if not statistics:
            return
        cosine = torch.nn.functional.cosine_similarity(
            statistics["forget_gradient"], statistics["retain_gradient"], dim=1, eps=1e-12
        )
        moving_average(state["agreement"], cosine.relu(), state["observations"], self.ema)
        state["observations"] += 1

    def decoder_penalty(self, W_dec: Tensor, state: State) -> Tensor:
        weights = mean_one(state["agreement"]).to(W_dec.dtype)
        return weighted_mean_squared_cosine(unit_rows(W_dec), weights)
