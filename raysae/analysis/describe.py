"""Trials and verdicts in a few words; light, for whoever must answer at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


TRANSFERRED = (
    "transferred score: the intervention is chosen on the questions that the search saw and read "
    "on the held-out ones, where the held-out score takes the best of 16 there"
)


def by_transferred(row: Mapping[Any, Any]) -> str:
    """A row of `confirmation.COLUMNS`, or of its CSV file, by the transferred score, with a warning
    where its verdict is not that of the held-out score; "" where the journal has none.
    """
    if not _has_transferred(row):
        return ""
    difference, low, high, p = (
        float(row[f"transferred_{name}"]) for name in ("difference", "low", "high", "p")
    )
    figures = (
        f"{float(row['candidate_transferred']):.3f} against "
        f"{float(row['baseline_transferred']):.3f}, difference {difference:+.3f} "
        f"[{low:+.3f}, {high:+.3f}], p {p:.2g}, "
        f"ahead in {float(row['transferred_wins']):.0f} of {row['seeds']}"
    )
    other = disagreement(row)
    return f"Caution, {other}: {figures}" if other else f"By the transferred score: {figures}"


def disagreement(row: Mapping[Any, Any]) -> str:
    """What the transferred score says where it is not what the held-out score says; else ""."""
    if not _has_transferred(row) or _word(row, "transferred_") == _word(row, ""):
        return ""
    return f"by the transferred score it {_word(row, 'transferred_')} it"


def _has_transferred(row: Mapping[Any, Any]) -> bool:
    return str(row.get("transferred_difference", "")) not in ("", "nan", "None")


def _word(row: Mapping[Any, Any], prefix: str) -> str:
    # As text: a CSV file has no truth values.
    if str(row[f"{prefix}beats"]) == "True":
        return "beats"
    return "is worse than" if str(row[f"{prefix}worse"]) == "True" else "is not shown to beat"
