"""Methods that act on what they have seen every `group_update_period` steps."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from raysae.errors import FieldError
from raysae.regularizers.base import Regularizer


class PeriodicRegularizer(Regularizer):
    """Base of the methods with a `group_update_period`."""

    searchable: ClassVar[frozenset[str]] = frozenset({"group_update_period"})

    group_update_period: int = Field(200, ge=1, description="steps between two updates")

    def check(self, architecture: str, d_sae: int, total_steps: int) -> None:
        if self.group_update_period > total_steps:
            raise FieldError(
                "group_update_period",
                f"group_update_period {self.group_update_period} is longer than the run "
                f"({total_steps} steps): nothing would ever be updated",
            )

    def kind(self, step: int) -> str | None:
        return None if self.is_update(step) else "plain"

    def is_update(self, step: int) -> bool:
        """Whether step `step` is one of the updates; step 0 is."""
        return step % self.group_update_period == 0
