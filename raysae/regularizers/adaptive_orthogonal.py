"""Controlled feature sharing: features that fire together may share direction, the rest may not."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from raysae.regularizers.base import State
from raysae.regularizers.cofiring import CofiringRegularizer, normalised_cofiring
from raysae.regularizers.gram import unit_rows


class AdaptiveOrthogonal(CofiringRegularizer):
    """penalty = d_in · mean over i ≠ j of max(|cos(W_i, W_j)| − s_ij, 0)².

    The allowance s_ij in [0, 1] is the measured co-activation of features i and j (moving average
    of the co-firing count over that of the rarer feature), refreshed every `group_update_period`
    steps. Before the first refresh it is 0: nothing may be shared.
    """

    name: ClassVar[str] = "adaptive_orthogonal"

    def init_state(self, d_in: int, d_sae: int, device: torch.device) -> State:
        allowance = torch.zeros(d_sae, d_sae, device=device)
        return super().init_state(d_in, d_sae, device) | {"allowance": allowance}

    def regroup(self, state: State, step: int) -> None:
        state["allowance"].copy_(normalised_cofiring(state["cofiring"]))

    def penalty(self, W_dec: Tensor, state: State) -> Tensor:
        n, d_in = W_dec.shape
        if n < 2:
            return W_dec.sum() * 0
        U = unit_rows(W_dec)
        excess = torch.relu((U @ U.T).abs() - state["allowance"])
        # i = j: cos is 1 by construction and carries no gradient worth having.
        off_diagonal = excess - torch.diag_embed(excess.diagonal())
        return off_diagonal.pow(2).sum() * (d_in / (n * (n - 1)))
