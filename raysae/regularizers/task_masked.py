"""Features are assigned to a task, kept apart from the other task's, and silent on its tokens."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from raysae.regularizers.base import State, StepView
from raysae.regularizers.gram import sum_squared_cosines_between, unit_rows
from raysae.regularizers.layout import while_unchanged
from raysae.regularizers.periodic import PeriodicRegularizer
from raysae.regularizers.tasks import (
    init_task_rates,
    mean_over_task,
    selectivity,
    task_statistics,
    update_task_rates,
)

SHARED, FORGET, RETAIN = 0, 1, 2


class TaskMasked(PeriodicRegularizer):
    """penalty = d_in · mean of cos²(W_i, W_j) over forget × retain pairs + leak.

    Every `group_update_period` steps a feature is assigned to a task by its selectivity
    s = (p_forget − p_retain) / (p_forget + p_retain): forget above `threshold`, retain below
    −`threshold`, else shared and free. leak = mean over assigned features of the mean activation on
    the other task's tokens over the (measured, detached) mean on its own: a ratio, so that it is
    not bought by shrinking activations.

    Source: task masking of the seed study (docs/seed_study.md), run 4, which gives no formula. The
    leak departs from the plain one, the mean activation on the other task's tokens: it is a ratio.
    """

    name: ClassVar[str] = "task_masked"
    searchable: ClassVar[frozenset[str]] = PeriodicRegularizer.searchable | {
        "ema",
        "threshold",
        "leak_weight",
    }

    ema: float = Field(0.98, ge=0.0, lt=1.0, description="weight of the past, per step")
    threshold: float = Field(0.3, ge=0, lt=1, description="selectivity of an assigned feature")
    leak_weight: float = Field(1.0, ge=0, description="weight of the leak")

    def init_state(self, d_in: int, d_sae: int, device: torch.device) -> State:
        groups = torch.full((d_sae,), SHARED, dtype=torch.long, device=device)
        return init_task_rates(d_sae, device) | {"groups": groups}

    def statistics(self, view: StepView, state: State, step: int) -> State:
        return task_statistics(view)

    def update(self, state: State, statistics: State, W_dec: Tensor, step: int) -> None:
        update_task_rates(state, statistics, self.ema)
        if self.is_update(step):
            s = selectivity(state)
            state["groups"].fill_(SHARED)
            state["groups"][s > self.threshold] = FORGET
            state["groups"][s < -self.threshold] = RETAIN

    def penalty(self, view: StepView, state: State) -> Tensor:
        forget, retain = while_unchanged(state["groups"], _of_tasks)
        U = unit_rows(view.W_dec)
        pairs = max(1, len(forget) * len(retain))
        overlap = sum_squared_cosines_between(U.index_select(0, forget), U.index_select(0, retain))
        return overlap * U.shape[1] / pairs + self.leak_weight * self._leak(
            view, state, forget, retain
        )

    def _leak(self, view: StepView, state: State, forget: Tensor, retain: Tensor) -> Tensor:
        values = view.activations.values
        on_forget, on_retain = mean_over_task(values, view, state)
        own_forget, own_retain = state["activation"].to(values.dtype)
        leaks = torch.cat(
            [
                on_other.index_select(0, features) / own.index_select(0, features).clamp_min(1e-6)
                for on_other, own, features in (
                    (on_retain, own_forget, forget),
                    (on_forget, own_retain, retain),
                )
            ]
        )
        return leaks.sum() / max(1, len(leaks))


def _of_tasks(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Features assigned to forget, and to retain."""
    forget, retain = ((groups == task).nonzero()[:, 0] for task in (FORGET, RETAIN))
    return forget, retain
