"""A trial in a few words; light, for whoever must answer at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

NOT_ASKED = "–"
"""In place of a score on questions that were not asked."""
SPARSITY_FIELDS = ("k", "l1_coefficient", "l0_coefficient")


def describe(spec: dict[str, Any]) -> str:
    """A trial in a few words: method, its parameters, α and schedule, sparsity."""
    method = dict(spec["regularizer"])
    name = method.pop("name")
    parts = [name]
    if "group_update_period" in method:
        parts.append(f"period={method['group_update_period']}")
    if "n_groups" in method:
        parts.append(f"groups={method['n_groups']}")
    if spec["alpha"]:
        parts.append(f"α={spec['alpha']:.3g} {spec['alpha_schedule']['name']}")
    sae = spec["sae"]
    sparsity = next(name for name in SPARSITY_FIELDS if sae[name] is not None)
    parts.append(f"{sparsity.removesuffix('_coefficient')}={sae[sparsity]:.3g}")
    return " ".join(parts)


def why_not_asked(stopped: Sequence[int]) -> str:
    """Why trials have no score on the questions that the search does not see; "" for none.

    Args:
        stopped: training steps at which such trials were stopped.
    """
    steps = [f"{step}" for step in sorted(set(stopped))]
    if not steps:
        return ""
    at = steps[0] if len(steps) == 1 else ", ".join(steps[:-1]) + " or " + steps[-1]
    return f"stopped at step {at}: scored on the questions searched on alone"
