"""Two levels of groups: features of a group, and super-groups, are pushed apart."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from raysae.errors import FieldError
from raysae.regularizers.base import State
from raysae.regularizers.gram import (
    mean_squared_cosine_between,
    mean_squared_cosine_within,
    unit_rows,
)
from raysae.regularizers.grouping import GroupingRegularizer


class Hierarchical(GroupingRegularizer):
    """penalty = β · within-group + (1 − β) · between super-groups, both d_in · mean cos².

    Groups as in `GroupingRegularizer`; super-groups are the groups' centroids clustered by
    agglomeration (average linkage on cosine distance) at every update. There β is re-balanced as
    well, logit β += balance_rate · ln(ratio / target_ratio), so that the measured overlap within
    groups tends to `target_ratio` times that between super-groups; β stays in [0.05, 0.95].

    Source: the hierarchical run 7 of the seed study (docs/seed_study.md), which gives no formula.
    One β with 1 − β takes the place of two independent weights: their sum is α's business.
    """

    name: ClassVar[str] = "hierarchical"
    searchable: ClassVar[frozenset[str]] = GroupingRegularizer.searchable | {
        "n_super_groups",
        "target_ratio",
        "balance_rate",
    }

    n_groups: int = Field(16, ge=3, description="number of groups")
    n_super_groups: int = Field(4, ge=2, description="number of groups of groups")
    target_ratio: float = Field(
        2.0, gt=0, description="overlap within groups over overlap between super-groups"
    )
    balance_rate: float = Field(0.5, ge=0, description="how fast β follows")

    def check(self, architecture: str, d_sae: int, total_steps: int) -> None:
        super().check(architecture, d_sae, total_steps)
        if self.n_super_groups >= self.n_groups:
            raise FieldError(
                "n_super_groups",
                f"n_super_groups {self.n_super_groups} must be below n_groups {self.n_groups}",
            )

    def init_state(self, d_in: int, d_sae: int, device: torch.device) -> State:
        return super().init_state(d_in, d_sae, device) | {
            "super_groups": torch.zeros(d_sae, dtype=torch.long, device=device),
            "beta": torch.tensor(0.5, device=device),
        }

    def regrouped(self, state: State, W_dec: Tensor) -> None:
        from sklearn.cluster import AgglomerativeClustering

        centroids = state["centroids"].double().cpu().numpy()
        # A centroid of features that never fire is zero and has no cosine: give it a direction.
        centroids = np.where(centroids.any(axis=1, keepdims=True), centroids, 1.0)
        clusters = AgglomerativeClustering(
            self.n_super_groups, metric="cosine", linkage="average"
        ).fit_predict(centroids)
        of_group = torch.from_numpy(clusters.astype(np.int64)).to(state["groups"].device)
        state["super_groups"].copy_(of_group[state["groups"]])
        within, between = self._overlaps(W_dec, state)
        if within > 0 and between > 0:
            ratio = torch.log(within / between / self.target_ratio)
            logit = torch.logit(state["beta"]) + self.balance_rate * ratio
            state["beta"].copy_(torch.sigmoid(logit).clamp(0.05, 0.95))

    def _overlaps(self, W_dec: Tensor, state: State) -> tuple[Tensor, Tensor]:
        U = unit_rows(W_dec)
        return (
            mean_squared_cosine_within(U, state["groups"]),
            mean_squared_cosine_between(U, state["super_groups"]),
        )

    def decoder_penalty(self, W_dec: Tensor, state: State) -> Tensor:
        within, between = self._overlaps(W_dec, state)
        return state["beta"] * within + (1 - state["beta"]) * between
