"""No regularizer: the baseline."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from raysae.regularizers.base import Regularizer, State, StepView


class NoRegularizer(Regularizer):
    """penalty = 0. The SAE's own loss alone, against which every method is read.

    Source: run 0 of the seed study (docs/seed_study.md), its baseline L1 SAE.
    """

    name: ClassVar[str] = "none"
    uses_alpha: ClassVar[bool] = False

    def penalty(self, view: StepView, state: State) -> Tensor:
        return view.W_dec.new_zeros(())
