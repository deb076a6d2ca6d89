"""A feature may not fire on the other task's tokens as strongly as on its own."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from raysae.regularizers.base import Regularizer, State, StepView
from raysae.regularizers.tasks import (
    init_task_rates,
    mean_over_task,
    task_statistics,
    update_task_rates,
)


class CrossTaskInhibition(Regularizer):
    """penalty = ½ Σ_tasks mean over the task's tokens of Σ_i max(a_i − τ_i, 0)² / τ_i², over L0.

    The sum runs over the features i that belong to the *other* task: the one on whose tokens they
    fire more often. τ_i follows the `quantile` of feature i's positive activations on its own
    task's tokens, τ ← τ · exp(rate · (share above τ − (1 − quantile))), a Robbins–Monro step that
    needs counts only; it starts at their mean. Division by L0, the number of features firing on a
    token, makes the penalty independent of sparsity and d_sae.

    Source: cross-task inhibition with dynamic thresholds of the seed study (docs/seed_study.md),
    run 8, which gives no formula; τ by stochastic approximation (Robbins & Monro, 1951). It departs
    from a mean over features, which would vanish as an SAE gets wider: a sum over L0.
    """

    name: ClassVar[str] = "cross_task_inhibition"
    searchable: ClassVar[frozenset[str]] = frozenset({"ema", "quantile", "rate"})

    ema: float = Field(0.98, ge=0.0, lt=1.0, description="weight of the past, per step")
    quantile: float = Field(0.5, gt=0, lt=1, description="of a feature's own activations, τ")
    rate: float = Field(0.2, gt=0, le=1, description="how fast τ follows")

    def init_state(self, d_in: int, d_sae: int, device: torch.device) -> State:
        return init_task_rates(d_sae, device) | {
            "threshold": torch.zeros(d_sae, device=device),
            "l0": torch.ones((), device=device),
        }

    def statistics(self, view: StepView, state: State, step: int) -> State:
        acts = view.activations
        above = (acts.values > acts.of_feature(state["threshold"])).to(acts.values.dtype)
        counts = acts.sum_by_task(above, view.is_forget)
        return task_statistics(view) | {"above": counts.float()}

    def update(self, state: State, statistics: State, W_dec: Tensor, step: int) -> None:
        update_task_rates(state, statistics, self.ema)
        own = _own(statistics, state)
        fired, above, activation = (own[name] for name in ("fired", "above", "activation"))
        threshold = state["threshold"]
        step_size = self.rate * (above / fired.clamp_min(1) - (1 - self.quantile))
        moved = torch.where(
            threshold > 0, threshold * step_size.exp(), activation / fired.clamp_min(1)
        )
        threshold.copy_(torch.where(fired > 0, moved, threshold))
        state["l0"].copy_(statistics["fired"].sum() / statistics["tokens"].sum())

    def penalty(self, view: StepView, state: State) -> Tensor:
        acts, dtype = view.activations, view.activations.values.dtype
        threshold = state["threshold"].to(dtype)
        excess = (acts.values - acts.of_feature(threshold)).relu()
        on_forget, on_retain = mean_over_task(excess.pow(2), view, state)
        belongs_to_forget = _belongs_to_forget(state)
        counted = torch.where(belongs_to_forget, on_retain, on_forget)
        counted = torch.where(threshold > 0, counted / threshold.clamp_min(1e-6).pow(2), 0.0)
        total: Tensor = 0.5 * counted.sum() / state["l0"].to(dtype).clamp_min(1e-6)
        return total


def _belongs_to_forget(state: State) -> Tensor:
    """(d_sae,) bool: fires at least as often on forget tokens as on retain tokens."""
    rate = state["firing_rate"]
    return rate[0] >= rate[1]


def _own(statistics: State, state: State) -> State:
    """The sums over the tokens of each feature's own task, (d_sae,) each."""
    belongs_to_forget = _belongs_to_forget(state)
    names = ("fired", "above", "activation")
    return {
        name: torch.where(belongs_to_forget, statistics[name][0], statistics[name][1])
        for name in names
    }
