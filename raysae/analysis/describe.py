"""Trials and verdicts in a few words; light, for whoever must answer at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan, nan
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


BEATS, WORSE, UNDECIDED = "beats", "is worse than", "is not shown to beat"
"""What a candidate does beside a baseline."""


def word_of(row: Mapping[Any, Any], prefix: str = "") -> str:
    """What a row of `confirmation.COLUMNS`, or of its CSV file, says of the candidate and the
    baseline, as a verb; `prefix` as of the columns.
    """
    # As text: a CSV file has no truth values.
    if str(row[f"{prefix}beats"]) == "True":
        return BEATS
    worse = str(row.get(f"{prefix}worse")) == "True"  # which old tables do not tell
    return WORSE if worse else UNDECIDED


def difference_of(row: Mapping[Any, Any], prefix: str = "") -> str:
    """The row's difference with its interval, which one seed alone does not have."""
    difference, low, high = (_number(row, f"{prefix}{n}") for n in ("difference", "low", "high"))
    return f"{difference:+.3f}" + ("" if isnan(low) else f" [{low:+.3f}, {high:+.3f}]")


def p_of(row: Mapping[Any, Any], prefix: str = "") -> str:
    """The row's p, and what is left of it beside the other rows; "" where an old table has none."""
    p, corrected = (_number(row, f"{prefix}{name}") for name in ("p", "p_holm"))
    if isnan(p):
        return ""
    return f"p {p:.2g}" + ("" if isnan(corrected) else f" (Holm {corrected:.2g})")


def by_transferred(row: Mapping[Any, Any]) -> str:
    """A row of `confirmation.COLUMNS`, or of its CSV file, by the transferred score, with a warning
    where its verdict is not that of the held-out score; "" where the journal has none.
    """
    if not _has_transferred(row):
        return ""
    figures = (
        f"{float(row['candidate_transferred']):.3f} against "
        f"{float(row['baseline_transferred']):.3f}, difference "
        f"{difference_of(row, 'transferred_')}, {p_of(row, 'transferred_')}, "
        f"ahead in {float(row['transferred_wins']):.0f} of {row['seeds']}"
    )
    other = disagreement(row)
    return f"Caution, {other}: {figures}" if other else f"By the transferred score: {figures}"


def disagreement(row: Mapping[Any, Any]) -> str:
    """What the transferred score says where it is not what the held-out score says; else ""."""
    if not _has_transferred(row):
        return ""
    held_out, transferred = word_of(row), word_of(row, "transferred_")
    if transferred == held_out:
        return ""
    if (held_out, transferred) == (WORSE, UNDECIDED):
        return "by the transferred score it is not shown to be worse"
    return f"by the transferred score it {transferred} it"


def _has_transferred(row: Mapping[Any, Any]) -> bool:
    return not isnan(_number(row, "transferred_difference"))


def _number(row: Mapping[Any, Any], name: str) -> float:
    """nan for what a table has not, or a CSV file has not written."""
    value = row.get(name)
    return nan if value in (None, "") else float(value)
