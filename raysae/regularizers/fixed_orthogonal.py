"""Every pair of features is pushed apart equally."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from raysae.regularizers.base import OrthogonalityRegularizer, State
from raysae.regularizers.gram import mean_squared_cosine, unit_rows


class FixedOrthogonal(OrthogonalityRegularizer):
    """penalty = d_in · mean over i ≠ j of cos²(W_i, W_j).

    Computed as (‖UᵀU‖²_F − d_sae) · d_in / (d_sae (d_sae − 1)) with unit rows U: O(d_sae · d_in²).
    With d_sae > d_in it cannot reach 0: its minimum is that of a tight frame (Welch, 1974).

    Source: the "fixed orthogonal SAE" that the seed study (docs/seed_study.md) plans beside its
    runs, and gives no formula for.
    """

    name: ClassVar[str] = "fixed_orthogonal"

    def decoder_penalty(self, W_dec: Tensor, state: State) -> Tensor:
        return mean_squared_cosine(unit_rows(W_dec))
