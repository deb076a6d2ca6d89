"""Batch-wise feature grouping with periodic updates."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from raysae.regularizers.base import State
from raysae.regularizers.gram import (
    mean_squared_cosine_between,
    mean_squared_cosine_within,
    unit_rows,
)
from raysae.regularizers.grouping import GroupingRegularizer


class Grouped(GroupingRegularizer):
    """penalty = d_in · mean of cos²(W_i, W_j) over pairs in different groups.

    Groups as in `GroupingRegularizer`. `scope: within` counts the pairs inside a group instead.

    Source: "batch-wise feature grouping with periodic updates" of the seed study
    (docs/seed_study.md), run 3, which gives no formula.
    """

    name: ClassVar[str] = "grouped"
    searchable: ClassVar[frozenset[str]] = GroupingRegularizer.searchable | {"scope"}

    scope: Literal["between", "within"] = Field(
        "between", description="which pairs are pushed apart"
    )

    def decoder_penalty(self, W_dec: Tensor, state: State) -> Tensor:
        within = self.scope == "within"
        mean = mean_squared_cosine_within if within else mean_squared_cosine_between
        return mean(unit_rows(W_dec), state["groups"])
