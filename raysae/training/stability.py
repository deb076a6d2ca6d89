"""How far groups of features stay the same when they are found anew."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from raysae.regularizers import Regularizer, State
from raysae.regularizers.periodic import PeriodicRegularizer


def rand_index(before: np.ndarray, after: np.ndarray) -> float:
    """Adjusted Rand index of two labellings (n,)."""
    # Imported here: takes seconds, and only methods that group features need it.
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score(before, after))


class GroupStability:
    """Updates regularizers, and compares old groups with new where an update regroups.

    The measure is the adjusted Rand index (Hubert & Arabie, "Comparing partitions", Journal of
    Classification 2, 1985): 1 the same groups whatever their names, 0 as by chance.
    """

    def __init__(self) -> None:
        self._found: list[float] = []

    def update(
        self, regularizer: Regularizer, state: State, statistics: State, W_dec: Tensor, step: int
    ) -> None:
        """`regularizer.update`, with groups compared; those of step 0 had none before them."""
        regroups = (
            isinstance(regularizer, PeriodicRegularizer)
            and "groups" in state
            and step > 0
            and regularizer.is_update(step)
        )
        before = state["groups"].cpu().numpy().copy() if regroups else None
        regularizer.update(state, statistics, W_dec, step)
        if before is None:
            return
        self._found.append(rand_index(before, state["groups"].cpu().numpy()))

    def take(self) -> float | None:
        """The mean since the last call; None where no update has been between."""
        found, self._found = self._found, []
        return math.fsum(found) / len(found) if found else None

    def state(self) -> list[float]:
        """What the next `take` is a mean of, so far."""
        return list(self._found)

    def load(self, state: list[float]) -> None:
        """Go on from a `state`."""
        self._found = list(state)
