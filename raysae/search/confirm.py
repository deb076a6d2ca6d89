"""Is the winner better, or was it picked by luck? The best are trained again beside the baselines.

The best of a search is flattered twice: by its seed and by the questions that ranked it. Here it is
trained with seeds that the search has not seen and read on the held-out half of the questions,
beside `none` and `fixed_orthogonal` with the same budget, sparsity and seeds.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pandas as pd

from raysae.analysis.seeds import seed_records
from raysae.analysis.statistics import bootstrap_interval
from raysae.config import RunConfig
from raysae.regularizers import REGISTRY
from raysae.training.schedules import Constant
from raysae.training.spec import TrialSpec

FRESH = 500_000
"""Index of the confirmation's first seed, above the number of any trial."""

BASELINES = ("none", "fixed_orthogonal")
COLUMNS = {
    "candidate": "trial of the search that was trained again",
    "baseline": "what it is compared with: same budget, sparsity and seeds",
    "seeds": "fresh seeds, the same for both",
    "candidate_heldout": "mean held-out score of the candidate",
    "baseline_heldout": "mean held-out score of the baseline",
    "difference": "mean of the differences by seed",
    "low": "2.5 % of the difference, bootstrap over seeds",
    "high": "97.5 %",
    "wins": "seeds in which the candidate is ahead",
    "beats": "whether low is above 0",
}


def confirmation_trials(config: RunConfig, ended: list[dict[str, Any]]) -> list[TrialSpec]:
    """The trials of the confirmation, numbered from the search's last on; [] if there are none.

    Args:
        config: of the search.
        ended: the journal's `end` records; the search's count.

    `fixed_orthogonal` gets the α and the schedule of the best trial of that method, or where the
    search tried none α = 1, constant.
    """
    ended = [record for record in ended if record["spec"]["stage"] == "search"]
    finished = [record for record in ended if record["state"] == "finished"]
    ranked = sorted(finished, key=lambda record: -record["rung"]["score"])
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
            name = f"{changes['regularizer'].name} beside {_budget(candidate)}"
            chosen.setdefault(name, candidate.model_copy(update=end | changes | {"run": name}))
    number = max((record["trial"] for record in ended), default=-1) + 1
    fresh = {"seed": config.seed_of(FRESH), "seeds": config.confirm.seeds}
    return [
        spec.model_copy(update=fresh | {"number": number + index})
        for index, spec in enumerate(chosen.values())
    ]


def verdicts(ended: list[dict[str, Any]]) -> pd.DataFrame:
    """One row a (candidate, baseline), columns as in `COLUMNS`; empty without a confirmation.

    Differences are taken seed by seed: both were trained from the same weights on the same batches.
    The interval resamples seeds, of which there are few: it says how much they agree, not more.
    """
    records = [
        r for r in ended if r["spec"]["stage"] == "confirmation" and r["state"] == "finished"
    ]
    scores: dict[str, dict[int, float]] = {}
    specs: dict[str, TrialSpec] = {}
    for record in records:
        spec = TrialSpec.model_validate(record["spec"])
        of_run = scores.setdefault(spec.run, {})
        for member, seed in zip(spec.members(), seed_records(record["rung"]), strict=True):
            of_run[member.seed] = seed["heldout_score"]
        specs[spec.run] = spec
    rows = []
    for run, spec in specs.items():
        if not run.startswith("trial "):
            continue
        for method in BASELINES:
            if method == spec.regularizer.name:  # there beside another candidate
                continue
            other = scores.get(f"{method} beside {_budget(spec)}", {})
            seeds = sorted(scores[run].keys() & other.keys())
            if not seeds:
                continue
            mine, theirs = (np.array([s[seed] for seed in seeds]) for s in (scores[run], other))
            low, high = bootstrap_interval(mine - theirs)
            rows.append(
                {
                    "candidate": int(run.removeprefix("trial ")),
                    "baseline": method,
                    "seeds": len(seeds),
                    "candidate_heldout": mine.mean(),
                    "baseline_heldout": theirs.mean(),
                    "difference": (mine - theirs).mean(),
                    "low": low,
                    "high": high,
                    "wins": int((mine > theirs).sum()),
                    "beats": bool(low > 0),
                }
            )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _score(record: dict[str, Any]) -> tuple[bool, float]:
    """Sort key: those trained to the end last, among them the best."""
    return record["state"] == "finished", record["rung"].get("score", 0.0)


def _method(record: dict[str, Any]) -> str:
    name: str = record["spec"]["regularizer"]["name"]
    return name


def _budget(spec: TrialSpec) -> str:
    """What a comparison holds equal, SAE and training, as words and four hex digits over it all."""
    same = {"sae": spec.sae.model_dump(), "training": spec.training.model_dump()}
    digest = hashlib.sha256(json.dumps(same, sort_keys=True, default=list).encode()).hexdigest()
    sparsity = f"{spec.sae.sparsity}={getattr(spec.sae, spec.sae.sparsity):g}"
    return f"{spec.sae.architecture} {sparsity}, {spec.training.steps} steps [{digest[:4]}]"
