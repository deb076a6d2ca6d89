"""Groups of features that fire alike, found every `group_update_period` steps."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from raysae.errors import FieldError
from raysae.regularizers.base import OrthogonalityRegularizer, State, StepView
from raysae.regularizers.cofiring import (
    PROFILE_WIDTH,
    cofiring_counts,
    cofiring_profiles,
    is_observed,
    moving_average,
)
from raysae.regularizers.lloyd import lloyd
from raysae.regularizers.periodic import PeriodicRegularizer

ITERATIONS = 20
"""Of k-means, at most."""


class GroupingRegularizer(PeriodicRegularizer, OrthogonalityRegularizer):
    """Base of the methods that group features.

    Groups come from spherical k-means (k-means on unit-norm rows) of the features' co-firing
    profiles, not of the decoder, every `group_update_period` steps, each time from the previous
    centroids. Before the first update all features are in one group.

    Source: spherical k-means (Dhillon & Modha, 2001), except that the centroids, means of unit
    rows, are not scaled to unit norm; scikit-learn's implementation, and on a GPU, from the second
    update on, the same iteration there (`lloyd`).
    """

    searchable: ClassVar[frozenset[str]] = PeriodicRegularizer.searchable | {"ema", "n_groups"}

    ema: float = Field(0.9, ge=0.0, lt=1.0, description="weight of the past, per observation")
    n_groups: int = Field(8, ge=2, description="number of groups")

    def check(self, architecture: str, d_sae: int, total_steps: int) -> None:
        super().check(architecture, d_sae, total_steps)
        if self.n_groups > d_sae:
            raise FieldError("n_groups", f"n_groups {self.n_groups} is larger than d_sae {d_sae}")

    def init_state(self, d_in: int, d_sae: int, device: torch.device) -> State:
        columns = min(d_sae, PROFILE_WIDTH)
        return {
            "cofiring": torch.zeros(d_sae, columns, device=device),
            "observations": torch.zeros((), dtype=torch.long, device=device),
            "groups": torch.zeros(d_sae, dtype=torch.long, device=device),
            "centroids": torch.zeros(self.n_groups, columns, device=device),
        }

    def kind(self, step: int) -> str | None:
        if self.is_update(step):
            return None
        return "observed" if is_observed(step, self.group_update_period) else "plain"

    def statistics(self, view: StepView, state: State, step: int) -> State:
        if not is_observed(step, self.group_update_period):
            return {}
        return {"cofiring": cofiring_counts(view.activations), "tokens": view.tokens}

    def update(self, state: State, statistics: State, W_dec: Tensor, step: int) -> None:
        if statistics:
            rate = statistics["cofiring"] / statistics["tokens"]
            moving_average(state["cofiring"], rate, state["observations"], self.ema)
            state["observations"] += 1
        if self.is_update(step):
            self._regroup(state)
            self.regrouped(state, W_dec)

    def regrouped(self, state: State, W_dec: Tensor) -> None:
        """What follows new groups, in place on `state`; nothing here."""

    def _regroup(self, state: State) -> None:
        points = cofiring_profiles(state["cofiring"]).double()
        start = state["centroids"].double()
        found = lloyd(points, start, ITERATIONS) if points.is_cuda and start.any() else None
        labels, centroids = self._on_host(points, start) if found is None else found
        state["groups"].copy_(labels)
        state["centroids"].copy_(centroids)

    def _on_host(self, points: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        # Imported here: scikit-learn takes seconds to load, and the entry point reads this class
        # only to validate a space file.
        from sklearn.cluster import KMeans
        from threadpoolctl import threadpool_limits

        profiles, previous = points.cpu().numpy(), start.cpu().numpy()
        warm = bool(np.any(previous))
        # One thread: the sums' order, hence the groups, must not depend on the machine's load.
        with threadpool_limits(limits=1):
            kmeans = KMeans(
                self.n_groups,
                init=previous if warm else "k-means++",
                n_init=1,
                max_iter=ITERATIONS,
                random_state=0,
            ).fit(profiles)
        labels = torch.from_numpy(kmeans.labels_.astype(np.int64))
        return labels, torch.from_numpy(kmeans.cluster_centers_)
