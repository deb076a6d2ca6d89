"""What an orthogonality regularizer is: a typed config with three pure steps and an explicit state.

A regularizer adds `α(t) · penalty` to the loss that a SAELens training SAE returns. It never owns
tensors: its state is a dictionary of tensors that the training loop keeps, saves and restores, so
one regularizer object can serve several SAEs at once.

Per training step:

1. `statistics(acts, is_forget, step)` sums over the batch; data-parallel workers add theirs up;
2. `update(state, statistics, step)` folds the sums into the state (moving averages, groups);
3. `penalty(W_dec, state)` is differentiated together with the SAE's own loss.

Every worker sees the same sums, hence holds the same state, at every step.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

State = dict[str, Tensor]


class Regularizer(BaseModel):
    """Base class: the fields are the method's hyperparameters, named as in a space file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: ClassVar[str]
    """How space files call it."""
    searchable: ClassVar[frozenset[str]] = frozenset()
    """Fields that a space file may set or search; `group_update_period` only where it acts."""
    uses_alpha: ClassVar[bool] = True

    def check(self, d_sae: int, total_steps: int) -> None:
        """Raise ValueError when this method cannot work on an SAE of that size and run length."""

    def init_state(self, d_in: int, d_sae: int, device: torch.device) -> State:
        """The state before the first step."""
        return {}

    def statistics(self, acts: Tensor, is_forget: Tensor, step: int) -> State:
        """Sums over the batch that `update` needs at this step; {} when it needs none.

        Args:
            acts: feature activations (batch, d_sae), detached.
            is_forget: which tokens come from the forget corpus (batch,), bool.
            step: index of the training step, from 0.
        """
        return {}

    def update(self, state: State, statistics: State, step: int) -> None:
        """Fold the (summed) statistics of step `step` into `state`, in place."""

    @abstractmethod
    def penalty(self, W_dec: Tensor, state: State) -> Tensor:
        """The penalty, a scalar, differentiable in `W_dec` (d_sae, d_in).

        Invariant to a positive scaling of decoder rows; 0 for an orthonormal decoder.
        """
