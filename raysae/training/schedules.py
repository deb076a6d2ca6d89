"""α schedules: the weight of the penalty as a pure function of the step, and of what was measured.

Each returns a factor; the weight at a step is `alpha · factor`. A schedule is a typed config with
one method, so it can be plotted without training anything.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from raysae.errors import FieldError


class AlphaSchedule(BaseModel):
    """Base class; the fields are what a space file may set or search."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: ClassVar[str]

    def check(self, total_steps: int) -> None:
        """Raise FieldError when this schedule would do nothing in a run of that length."""

    @abstractmethod
    def factor(
        self, step: int, total_steps: int, previous: float = 1.0, overlap: float = 0.0
    ) -> float:
        """The factor on α at `step` (from 0) of `total_steps`.

        Args:
            step: index of the training step.
            total_steps: length of the run.
            previous: the factor at the step before; 1 at step 0.
            overlap: measured forget–retain overlap in [0, 1], see `measures`.
        """

    def measures(self, step: int) -> bool:
        """Whether `factor` looks at the overlap at that step; measuring waits for the device."""
        return False


class Constant(AlphaSchedule):
    """factor = 1."""

    name: ClassVar[str] = "constant"

    def factor(
        self, step: int, total_steps: int, previous: float = 1.0, overlap: float = 0.0
    ) -> float:
        return 1.0


class LinearWarmup(AlphaSchedule):
    """factor rises linearly from 0 to 1 over the first `warmup_fraction` of the run, then stays."""

    name: ClassVar[str] = "linear_warmup"

    warmup_fraction: float = Field(0.2, gt=0.0, le=1.0, description="share of the run")

    def factor(
        self, step: int, total_steps: int, previous: float = 1.0, overlap: float = 0.0
    ) -> float:
        return min(1.0, step / max(1.0, self.warmup_fraction * total_steps))


class LinearDecay(AlphaSchedule):
    """factor falls linearly from 1 to `end_factor` over the run."""

    name: ClassVar[str] = "linear_decay"

    end_factor: float = Field(0.0, ge=0.0, le=1.0, description="factor at the last step")

    def factor(
        self, step: int, total_steps: int, previous: float = 1.0, overlap: float = 0.0
    ) -> float:
        return 1.0 + (self.end_factor - 1.0) * _progress(step, total_steps)


class Cosine(AlphaSchedule):
    """factor falls from 1 to `end_factor` along half a cosine over the run."""

    name: ClassVar[str] = "cosine"

    end_factor: float = Field(0.0, ge=0.0, le=1.0, description="factor at the last step")

    def factor(
        self, step: int, total_steps: int, previous: float = 1.0, overlap: float = 0.0
    ) -> float:
        half_turn = math.pi * _progress(step, total_steps)
        return self.end_factor + (1 - self.end_factor) * 0.5 * (1 + math.cos(half_turn))


class Dynamic(AlphaSchedule):
    """factor follows the measured overlap of forget and retain firing.

    Every `every` steps: factor ← clamp(factor · exp(gain · (overlap − target) / target)), between
    `min_factor` and `max_factor`. Multiplicative feedback: while the tasks share more features than
    the target, the penalty grows, below it shrinks. overlap = Σ_i min(p_i^F, p_i^R) /
    Σ_i max(p_i^F, p_i^R) over moving averages of the firing rates on either task's tokens: 1 where
    every feature fires alike on both, 0 where none fires on both.
    """

    name: ClassVar[str] = "dynamic"

    target: float = Field(0.3, gt=0.0, le=1.0, description="overlap aimed at")
    gain: float = Field(0.1, gt=0.0, description="strength of the feedback")
    every: int = Field(20, ge=1, description="steps between two measurements")
    min_factor: float = Field(0.1, gt=0.0, description="lower clamp")
    max_factor: float = Field(10.0, gt=0.0, description="upper clamp")

    @model_validator(mode="after")
    def _clamps_are_ordered(self) -> Dynamic:
        if self.min_factor > self.max_factor:
            raise FieldError(
                "min_factor",
                f"min_factor {self.min_factor:g} is above max_factor {self.max_factor:g}",
            )
        return self

    def check(self, total_steps: int) -> None:
        if self.every >= total_steps:
            raise FieldError(
                "every",
                f"every {self.every} is not below the run's {total_steps} steps: the overlap would "
                "never be measured",
            )

    def measures(self, step: int) -> bool:
        return step > 0 and step % self.every == 0

    def factor(
        self, step: int, total_steps: int, previous: float = 1.0, overlap: float = 0.0
    ) -> float:
        if self.measures(step):
            previous *= math.exp(self.gain * (overlap - self.target) / self.target)
        return min(self.max_factor, max(self.min_factor, previous))


def trajectory(schedule: AlphaSchedule, overlaps: Sequence[float]) -> list[float]:
    """The factors on α of a whole run, a step for each of the measured overlaps."""
    factors = [1.0]
    for step, overlap in enumerate(overlaps):
        factors.append(schedule.factor(step, len(overlaps), factors[-1], overlap))
    return factors[1:]


def _progress(step: int, total_steps: int) -> float:
    """0 at the first step, 1 at the last."""
    return min(1.0, step / max(1, total_steps - 1))


SCHEDULES: dict[str, type[AlphaSchedule]] = {
    schedule.name: schedule for schedule in (Constant, LinearWarmup, Cosine, LinearDecay, Dynamic)
}
