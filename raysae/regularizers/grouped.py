"""Batch-wise feature grouping with periodic updates."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from raysae.regularizers.base import State
from raysae.regularizers.cofiring import CofiringRegularizer, normalised_cofiring
from raysae.regularizers.gram import (
    sum_squared_cosines,
    sum_squared_cosines_within,
    unit_rows,
)


class Grouped(CofiringRegularizer):
    """penalty = d_in · mean of cos²(W_i, W_j) over pairs in different groups.

    Groups come from spherical k-means (k-means on unit-norm rows) of the features' co-firing
    profiles, not of the decoder, every `group_update_period` steps, each time from the previous
    centroids. `scope: within` counts the pairs inside a group instead. Before the first update all
    features are in one group.
    """

    name: ClassVar[str] = "grouped"
    searchable: ClassVar[frozenset[str]] = CofiringRegularizer.searchable | {"n_groups", "scope"}

    n_groups: int = Field(8, ge=2, description="number of groups")
    scope: Literal["between", "within"] = Field(
        "between", description="which pairs are pushed apart"
    )

    def check(self, d_sae: int, total_steps: int) -> None:
        super().check(d_sae, total_steps)
        if self.n_groups > d_sae:
            raise ValueError(f"n_groups {self.n_groups} is larger than d_sae {d_sae}")

    def init_state(self, d_in: int, d_sae: int, device: torch.device) -> State:
        return super().init_state(d_in, d_sae, device) | {
            "groups": torch.zeros(d_sae, dtype=torch.long, device=device),
            "centroids": torch.zeros(self.n_groups, d_sae, device=device),
        }

    def regroup(self, state: State, step: int) -> None:
        # Imported here: scikit-learn takes seconds to load, and the entry point reads this class
        # only to validate a space file.
        from sklearn.cluster import KMeans
        from threadpoolctl import threadpool_limits

        profiles = unit_rows(normalised_cofiring(state["cofiring"])).double().cpu().numpy()
        previous = state["centroids"].double().cpu().numpy()
        warm = bool(np.any(previous))
        # One thread: the sums' order, hence the groups, must not depend on the machine's load.
        with threadpool_limits(limits=1):
            kmeans = KMeans(
                self.n_groups,
                init=previous if warm else "k-means++",
                n_init=1,
                max_iter=20,
                random_state=0,
            ).fit(profiles)
        state["groups"].copy_(torch.from_numpy(kmeans.labels_.astype(np.int64)))
        state["centroids"].copy_(torch.from_numpy(kmeans.cluster_centers_))

    def penalty(self, W_dec: Tensor, state: State) -> Tensor:
        n, d_in = W_dec.shape
        U, groups = unit_rows(W_dec), state["groups"]
        sizes = torch.bincount(groups, minlength=self.n_groups).to(W_dec.dtype)
        within, pairs_within = sum_squared_cosines_within(U, groups), (sizes * sizes).sum()
        if self.scope == "within":
            total, pairs = within - n, pairs_within - n
        else:
            total, pairs = sum_squared_cosines(U) - within, n * n - pairs_within
        return torch.where(pairs > 0, total * d_in / pairs.clamp_min(1), total * 0)
