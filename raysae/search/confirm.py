"""Is the winner better, or was it picked by luck? The best are trained again beside the baselines.

The best of a search is flattered twice: by its seed and by the questions that ranked it. Here it is
trained with seeds that the search has not seen and read on the held-out half of the questions,
beside `none` and `fixed_orthogonal` with the same budget, sparsity and seeds.
"""

from __future__ import annotations

from itertools import product
from typing import Any

from raysae.analysis.confirmation import budget
from raysae.config import RunConfig
from raysae.regularizers import REGISTRY
from raysae.training.schedules import Constant
from raysae.training.spec import SEED_STRIDE, TrialSpec

FRESH = 500_000
"""Index of the confirmation's first seed, above the number of any trial."""


def confirmation_trials(
    config: RunConfig, ended: list[dict[str, Any]], seeds_per_trial: int | None = None
) -> list[TrialSpec]:
    """The trials of the confirmation, numbered from the search's last on; [] if there are none.

    Args:
        config: of the search.
        ended: the journal's `end` records; the search's count.
        seeds_per_trial: of a configuration's seeds so many make a trial, and what is left one more;
            None: all of them.

    `fixed_orthogonal` gets the α and the schedule of the best trial of that method, or where the
    search tried none α = 1, constant.
    """
    ended = [record for record in ended if record["spec"]["stage"] == "search"]
    finished = [record for record in ended if record["state"] == "finished"]
    ranked = sorted(finished, key=_rank, reverse=True)
    best = [TrialSpec.model_validate(r["spec"]) for r in ranked[: config.confirm.top]]
    fixed = [
        r["spec"]
        for r in sorted(ended, key=_score)
        if _method(r) == "fixed_orthogonal" and r["state"] != "failed"
    ]
    baselines: list[dict[str, Any]] = [
        {"regularizer": REGISTRY["none"](), "alpha": 0.0, "alpha_schedule": Constant()},
        {
            "regularizer": REGISTRY["fixed_orthogonal"](),
            "alpha": fixed[-1]["alpha"] if fixed else 1.0,
            "alpha_schedule": TrialSpec.model_validate(fixed[-1]).alpha_schedule
            if fixed
            else Constant(),
        },
    ]
    chosen: dict[str, TrialSpec] = {}
    for candidate in best:
        end = {"stage": "confirmation", "rungs": candidate.rungs[-1:]}
        chosen.setdefault(
            f"trial {candidate.number}",
            candidate.model_copy(update=end | {"run": f"trial {candidate.number}"}),
        )
        for changes in baselines:
            if changes["regularizer"].name == candidate.regularizer.name:
                continue
            name = f"{changes['regularizer'].name} beside {budget(candidate)}"
            chosen.setdefault(name, candidate.model_copy(update=end | changes | {"run": name}))
    number = max((record["trial"] for record in ended), default=-1) + 1
    seeds = config.confirm.seeds
    each = seeds_per_trial or seeds
    parts = [
        {
            "seed": config.seed_of(FRESH) + first * SEED_STRIDE,
            "seeds": min(each, seeds - first),
        }
        for first in range(0, seeds, each)
    ]
    return [
        spec.model_copy(update=part | {"number": number + index})
        for index, (spec, part) in enumerate(product(chosen.values(), parts))
    ]


def begun_with(records: list[dict[str, Any]]) -> int | None:
    """Seeds a trial of a confirmation that an earlier session began; None without one.

    Numbers mean the same trials then, whatever machine the search is gone on with on.

    Args:
        records: the journal.
    """
    asked = [r["spec"] for r in records if r["event"] == "submit"]
    return max((spec["seeds"] for spec in asked if spec["stage"] == "confirmation"), default=None)


def _rank(record: dict[str, Any]) -> tuple[float, float]:
    """Score, and between equal ones the frontier, as on the leaderboard."""
    rung = record["rung"]
    return rung["score"], rung.get("halves", {}).get("search", {}).get("frontier", 0.0)


def _score(record: dict[str, Any]) -> tuple[bool, float]:
    """Sort key: those trained to the end last, among them the best."""
    return record["state"] == "finished", record["rung"].get("score", 0.0)


def _method(record: dict[str, Any]) -> str:
    name: str = record["spec"]["regularizer"]["name"]
    return name
