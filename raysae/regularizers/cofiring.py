"""How often features fire together: the statistic behind sharing allowances and groups."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from raysae.regularizers.base import Regularizer, State

OBSERVATIONS_PER_PERIOD = 8
MAX_D_SAE = 8192


class CofiringRegularizer(Regularizer):
    """Base of the methods that watch co-firing and act on it every `group_update_period` steps.

    State: `cofiring` (d_sae, d_sae), the moving average of the share of tokens on which two
    features fire together (its diagonal is the firing rate). One batch in
    `max(1, group_update_period / 8)` is observed, so that a long period costs little.
    """

    searchable: ClassVar[frozenset[str]] = frozenset({"group_update_period", "ema"})

    group_update_period: int = Field(200, ge=1, description="steps between two updates")
    ema: float = Field(0.9, ge=0.0, lt=1.0, description="weight of the past, per observation")

    def check(self, d_sae: int, total_steps: int) -> None:
        if self.group_update_period > total_steps:
            raise ValueError(
                f"group_update_period {self.group_update_period} is longer than the run "
                f"({total_steps} steps): the groups would never be updated"
            )
        if d_sae > MAX_D_SAE:
            raise ValueError(
                f"{self.name} keeps a table of d_sae² co-firing rates: d_sae {d_sae} is above "
                f"{MAX_D_SAE}"
            )

    def init_state(self, d_in: int, d_sae: int, device: torch.device) -> State:
        return {
            "cofiring": torch.zeros(d_sae, d_sae, device=device),
            "observations": torch.zeros((), dtype=torch.long, device=device),
        }

    def statistics(self, acts: Tensor, is_forget: Tensor, step: int) -> State:
        if step % max(1, self.group_update_period // OBSERVATIONS_PER_PERIOD):
            return {}
        fired = (acts > 0).to(torch.float32)
        return {
            "cofiring": fired.T @ fired,
            "tokens": torch.tensor(float(len(fired)), device=acts.device),
        }

    def update(self, state: State, statistics: State, step: int) -> None:
        if statistics:
            rate = statistics["cofiring"] / statistics["tokens"]
            # The first observation replaces the initial zeros instead of averaging with them.
            keep = torch.where(state["observations"] > 0, self.ema, 0.0)
            state["cofiring"].mul_(keep).add_(rate * (1 - keep))
            state["observations"] += 1
        if step % self.group_update_period == 0:
            self.regroup(state, step)

    @abstractmethod
    def regroup(self, state: State, step: int) -> None:
        """What happens every `group_update_period` steps, in place on `state`."""


def normalised_cofiring(cofiring: Tensor) -> Tensor:
    """Share of the rarer feature's tokens on which both fire, in [0, 1]; 0 where one never fires.

    Args:
        cofiring: rates of firing together (d_sae, d_sae), firing rates on the diagonal.
    """
    rate = cofiring.diagonal()
    rarer = torch.minimum(rate[:, None], rate[None, :])
    share = torch.where(rarer > 0, cofiring / rarer.clamp_min(1e-12), torch.zeros_like(cofiring))
    return share.clamp(0, 1)
