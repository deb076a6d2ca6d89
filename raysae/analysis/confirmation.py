"""What a confirmation proves: candidates beside baselines, seed by seed, on held-out questions."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pandas as pd

from raysae.analysis.seeds import seed_records
from raysae.analysis.statistics import bootstrap_interval, p_of_mean
from raysae.training.spec import TrialSpec

BASELINES = ("none", "fixed_orthogonal")
SIGNIFICANT = 0.05
"""Two-sided; chance alone finds one better in half as many comparisons."""
COLUMNS = {
    "candidate": "trial of the search that was trained again",
    "baseline": "what it is compared with: same budget, sparsity and seeds",
    "seeds": "fresh seeds, the same for both",
    "candidate_heldout": "mean held-out score of the candidate",
    "baseline_heldout": "mean held-out score of the baseline",
    "difference": "mean of the differences by seed",
    "low": "2.5 % of the difference, bootstrap over seeds",
    "high": "97.5 %",
    "p": "two-sided p of a paired t-test: by chance the seeds would differ so much so often",
    "wins": "seeds in which the candidate is ahead",
    "beats": f"whether low is above 0 and p below {SIGNIFICANT}",
    "worse": f"whether high is below 0 and p below {SIGNIFICANT}",
}


def verdicts(ended: list[dict[str, Any]]) -> pd.DataFrame:
    """One row a (candidate, baseline), columns as in `COLUMNS`; empty without a confirmation.

    Differences are taken seed by seed: both were trained from the same weights on the same batches.
    The interval resamples seeds, of which there are few: it says how much they agree, not more;
    what that is worth with so few says the t-test.
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
            other = scores.get(f"{method} beside {budget(spec)}", {})
            seeds = sorted(scores[run].keys() & other.keys())
            if not seeds:
                continue
            mine, theirs = (np.array([s[seed] for seed in seeds]) for s in (scores[run], other))
            low, high = bootstrap_interval(mine - theirs)
            p = p_of_mean(mine - theirs)
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
                    "p": p,
                    "wins": int((mine > theirs).sum()),
                    "beats": bool(low > 0 and p < SIGNIFICANT),
                    "worse": bool(high < 0 and p < SIGNIFICANT),
                }
            )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def budget(spec: TrialSpec) -> str:
    """What a comparison holds equal, SAE and training, as words and four hex digits over it all."""
    same = {"sae": spec.sae.model_dump(), "training": spec.training.model_dump()}
    digest = hashlib.sha256(json.dumps(same, sort_keys=True, default=list).encode()).hexdigest()
    sparsity = f"{spec.sae.sparsity}={getattr(spec.sae, spec.sae.sparsity):g}"
    return f"{spec.sae.architecture} {sparsity}, {spec.training.steps} steps [{digest[:4]}]"
