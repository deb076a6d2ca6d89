"""α schedules: the weight of the penalty as a pure function of the step.

Each returns a factor in [0, 1]; the weight at a step is `alpha · factor`. A schedule is a typed
config with one method, so it can be plotted without training anything.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field


class AlphaSchedule(BaseModel):
    """Base class; the fields are what a space file may set or search."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: ClassVar[str]

    @abstractmethod
    def factor(self, step: int, total_steps: int) -> float:
        """The factor on α at `step` (from 0) of `total_steps`, in [0, 1]."""


class Constant(AlphaSchedule):
    """factor = 1."""

    name: ClassVar[str] = "constant"

    def factor(self, step: int, total_steps: int) -> float:
        return 1.0


class LinearWarmup(AlphaSchedule):
    """factor rises linearly from 0 to 1 over the first `warmup_fraction` of the run, then stays."""

    name: ClassVar[str] = "linear_warmup"

    warmup_fraction: float = Field(0.2, gt=0.0, le=1.0, description="share of the run")

    def factor(self, step: int, total_steps: int) -> float:
        return min(1.0, step / max(1.0, self.warmup_fraction * total_steps))


class Cosine(AlphaSchedule):
    """factor falls from 1 to `end_factor` along half a cosine over the run."""

    name: ClassVar[str] = "cosine"

    end_factor: float = Field(0.0, ge=0.0, le=1.0, description="factor at the last step")

    def factor(self, step: int, total_steps: int) -> float:
        progress = min(1.0, step / max(1, total_steps - 1))
        return self.end_factor + (1 - self.end_factor) * 0.5 * (1 + math.cos(math.pi * progress))


SCHEDULES: dict[str, type[AlphaSchedule]] = {
    schedule.name: schedule for schedule in (Constant, LinearWarmup, Cosine)
}
