"""A trial's several SAEs as one record: means for whoever compares trials, each seed by itself
beside them.

What is no number (the status and its cause, the interventions) is that of the seed with the median
score: of three SAEs neither the luckiest nor the unluckiest.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

SCORES = ("score", "heldout_score", "transferred_score", "saebench_score")
"""Fields of which a spread over seeds is given; only the first is there where the search half of
the questions alone was asked."""

SEARCH_HALF, ALL_QUESTIONS = "search half", "all"
"""What an SAE was asked at a rung, the field `questions` of its record: at the end of its training
everything, on the way what the search sees."""

_MEANS = ("objective", "dense_features", *SCORES)
_SUMS = ("train_seconds", "score_seconds")


def over_seeds(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The record of a trial's rung from those of its SAEs, in the order of their seeds.

    With one SAE it is that SAE's. With several it has as well `typical_seed`, the index of the one
    with the median score (the lower of two), `seeds`, the records themselves, and `<score>_std`,
    the sample standard deviation of each score.
    """
    if len(records) == 1:
        return records[0]
    by_score = sorted(range(len(records)), key=lambda i: records[i]["score"])
    typical = by_score[(len(records) - 1) // 2]
    middle = records[typical]
    scores = ", ".join(f"{record['score']:.3f}" for record in records)
    probing = [record["sparse_probing"] for record in records]
    return {
        **middle,
        "cause": f"of {len(records)} seeds ({scores}) the median: {middle['cause']}",
        **{name: _of_all(statistics.fmean, records, name) for name in _MEANS},
        **{name: sum(record[name] for record in records) for name in _SUMS},
        **{f"{name}_std": _of_all(statistics.stdev, records, name) for name in SCORES},
        "metrics": _mean_of_each([record["metrics"] for record in records]),
        "sparse_probing": _mean_of_each(probing) if all(probing) else None,
        "typical_seed": typical,
        "seeds": records,
    }


def asked(rung: dict[str, Any]) -> str:
    """`ALL_QUESTIONS` or `SEARCH_HALF`; journals did not always have the field, nor the half."""
    return str(rung.get("questions", ALL_QUESTIONS))


def seed_records(rung: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of a rung's SAEs, in the order of their seeds; of one SAE the rung itself."""
    return rung.get("seeds") or [rung]


def mean_curve(curves: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Training curves of several SAEs of a trial, row by row, as one of their means."""
    return [_mean_of_each(list(rows)) for rows in zip(*curves, strict=True)]


def _of_all(
    statistic: Callable[[list[float]], float], records: list[dict[str, Any]], name: str
) -> float | None:
    """None where a record lacks the figure: that of the others is not the trial's."""
    values = [record[name] for record in records]
    return None if None in values else statistic(values)


def _mean_of_each(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Whole numbers that agree stay whole."""
    first = rows[0]
    return {
        name: first[name]
        if all(row[name] == first[name] for row in rows)
        else statistics.fmean(row[name] for row in rows)
        for name in first
    }
