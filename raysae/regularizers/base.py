"""What an orthogonality regularizer is: a typed config with three pure steps and an explicit state.

A regularizer adds `α(t) · penalty` to the loss that a SAELens training SAE returns. It never owns
tensors: its state is a dictionary of tensors that the training loop keeps, saves and restores, so
one regularizer object can serve several SAEs at once.

Per training step:

1. `statistics(view, state, step)` sums over the batch; data-parallel workers add theirs up;
2. `update(state, statistics, W_dec, step)` folds the sums into the state (averages, groups);
3. `penalty(view, state)` is differentiated together with the SAE's own loss.

Every worker sees the same sums and the same decoder, hence holds the same state, at every step.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from raysae.regularizers.activations import Activations, DenseActivations

State = dict[str, Tensor]


class StepView:
    """What a regularizer may look at in one training step of one worker."""

    def __init__(
        self, W_dec: Tensor, acts: Tensor | Activations, is_forget: Tensor, error: Tensor
    ) -> None:
        """
        Args:
            W_dec: decoder (d_sae, d_in).
            acts: feature activations of the batch, at least 0; a tensor is (batch, d_sae).
            is_forget: which tokens come from the forget corpus (batch,), bool.
            error: reconstruction − input (batch, d_in).
        """
        self.W_dec, self.is_forget, self.error = W_dec, is_forget, error
        self.activations = DenseActivations(acts) if isinstance(acts, Tensor) else acts

    @property
    def acts(self) -> Tensor:
        """Feature activations (batch, d_sae), at least 0. Sparse ones have to be laid out."""
        return self.activations.dense

    @property
    def tokens(self) -> Tensor:
        """Rows of the batch, as a scalar that can be summed over workers."""
        return torch.full((), float(len(self.is_forget)), device=self.is_forget.device)

    def detach(self) -> StepView:
        """The same without gradients."""
        return StepView(
            self.W_dec.detach(), self.activations.detach(), self.is_forget, self.error.detach()
        )


class Regularizer(BaseModel):
    """Base class: the fields are the method's hyperparameters, named as in a space file."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: ClassVar[str]
    """How space files call it."""
    searchable: ClassVar[frozenset[str]] = frozenset()
    """Fields that a space file may set or search; `group_update_period` only where it acts."""
    uses_alpha: ClassVar[bool] = True

    def check(self, architecture: str, d_sae: int, total_steps: int) -> None:
        """Raise ValueError when this method cannot work on such an SAE and run length; a
        FieldError where one of its parameters is why."""

    def init_state(self, d_in: int, d_sae: int, device: torch.device) -> State:
        """The state before the first step."""
        return {}

    def kind(self, step: int) -> str | None:
        """What this method does at that step, by a name of its own.

        At steps of one kind it asks the same operations of the device, whatever the numbers, so
        that they can be recorded once and replayed. None: the host takes part (an update of
        groups), and what was recorded before holds no longer.
        """
        return "plain"

    def statistics(self, view: StepView, state: State, step: int) -> State:
        """Sums over the batch that `update` needs at this step; {} when it needs none.

        Args:
            view: of this worker's part of the batch, detached.
            state: read only.
            step: index of the training step, from 0.
        """
        return {}

    def update(self, state: State, statistics: State, W_dec: Tensor, step: int) -> None:
        """Fold the (summed) statistics of step `step` into `state`, in place.

        Args:
            state: of this SAE.
            statistics: summed over the workers.
            W_dec: the decoder (d_sae, d_in), detached.
            step: index of the training step, from 0.
        """

    @abstractmethod
    def penalty(self, view: StepView, state: State) -> Tensor:
        """The penalty, a scalar, differentiable in the view's tensors.

        About 1 for a random decoder. The workers' mean is the whole batch's penalty.
        """


class OrthogonalityRegularizer(Regularizer):
    """Base of the methods whose penalty looks at the decoder only."""

    @abstractmethod
    def decoder_penalty(self, W_dec: Tensor, state: State) -> Tensor:
        """The penalty, a scalar, differentiable in `W_dec` (d_sae, d_in).

        Invariant to a positive scaling of decoder rows; 0 for an orthonormal decoder.
        """

    def penalty(self, view: StepView, state: State) -> Tensor:
        return self.decoder_penalty(view.W_dec, state)
