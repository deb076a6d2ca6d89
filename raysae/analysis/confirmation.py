"""What a confirmation proves: candidates beside baselines, seed by seed, on held-out questions."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pandas as pd

from raysae.analysis.seeds import seed_records
from raysae.analysis.statistics import SIGNIFICANT, bootstrap_interval, holm, p_of_mean
from raysae.training.spec import TrialSpec

BASELINES = ("none", "fixed_orthogonal")
KINDS = {"heldout": "", "transferred": "transferred_"}
"""Scores that are compared, with the prefix of their columns."""
COLUMNS = {
    "candidate": "trial of the search that was trained again",
    "baseline": "what it is compared with: same budget, sparsity and seeds",
    "seeds": "fresh seeds, the same for both",
    "candidate_heldout": "mean held-out score of the candidate",
    "baseline_heldout": "mean held-out score of the baseline",
    "difference": "mean of the differences by seed",
    "low": "2.5 % of the difference, bootstrap over seeds",
    "high": "97.5 %",
    "p": "two-sided p of a paired t-test: by chance the seeds would differ so much so often; that "
    "of the sign test where all differences are equal",
    "p_holm": "p corrected for the number of rows (Holm): so often would chance find so much in "
    "any of them",
    "wins": "seeds in which the candidate is ahead",
    "beats": f"whether low is above 0 and p_holm below {SIGNIFICANT}",
    "worse": f"whether high is below 0 and p_holm below {SIGNIFICANT}",
    "candidate_transferred": "mean transferred score of the candidate; this and what follows is "
    "missing where journals of an older version have none",
    "baseline_transferred": "mean transferred score of the baseline",
    "transferred_difference": "of transferred scores, the same statistics as of held-out ones",
    "transferred_low": "2.5 % of transferred_difference",
    "transferred_high": "97.5 %",
    "transferred_p": "of transferred_difference",
    "transferred_p_holm": "of transferred_p, over the rows that have one",
    "transferred_wins": "seeds in which the candidate is ahead",
    "transferred_beats": "what `beats` would be by the transferred score",
    "transferred_worse": "what `worse` would be",
}


def verdicts(ended: list[dict[str, Any]]) -> pd.DataFrame:
    """One row a (candidate, baseline), columns as in `COLUMNS`; empty without a confirmation.

    Differences are taken seed by seed: both were trained from the same weights on the same batches.
    The interval resamples seeds, of which there are few: it says how much they agree, not more;
    what that is worth with so few says the t-test. Several candidates beside several baselines are
    as many chances to be lucky, so that its p counts corrected for the rows of the table.
    """
    records = [
        r for r in ended if r["spec"]["stage"] == "confirmation" and r["state"] == "finished"
    ]
    scores: dict[str, dict[int, tuple[float, float | None]]] = {}
    specs: dict[str, TrialSpec] = {}
    for record in records:
        spec = TrialSpec.model_validate(record["spec"])
        of_run = scores.setdefault(spec.run, {})
        for member, seed in zip(spec.members(), seed_records(record["rung"]), strict=True):
            # Journals did not always have the second.
            of_run[member.seed] = seed["heldout_score"], seed.get("transferred_score")
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
            row: dict[str, Any] = {
                "candidate": int(run.removeprefix("trial ")),
                "baseline": method,
                "seeds": len(seeds),
            }
            for i, (kind, prefix) in enumerate(KINDS.items()):
                pairs = [(scores[run][seed][i], other[seed][i]) for seed in seeds]
                if any(None in pair for pair in pairs):  # a mean of some seeds is not that of all
                    continue
                mine, theirs = np.array(pairs, dtype=float).T
                row |= {f"candidate_{kind}": mine.mean(), f"baseline_{kind}": theirs.mean()}
                row |= {f"{prefix}{name}": found for name, found in _compare(mine, theirs).items()}
            rows.append(row)
    for prefix in KINDS.values():
        judge([row for row in rows if f"{prefix}p" in row], prefix)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def judge(rows: list[dict[str, Any]], prefix: str = "") -> None:
    """Add `p_holm`, `beats` and `worse` to the rows of a table of comparisons, which have `low`,
    `high` and `p`; all of these names with `prefix`.
    """
    corrected = holm(np.array([row[f"{prefix}p"] for row in rows], dtype=float))
    for row, p in zip(rows, corrected, strict=True):
        row[f"{prefix}p_holm"] = float(p)
        row[f"{prefix}beats"] = bool(row[f"{prefix}low"] > 0 and p < SIGNIFICANT)
        row[f"{prefix}worse"] = bool(row[f"{prefix}high"] < 0 and p < SIGNIFICANT)


def _compare(mine: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """Statistics of the differences of scores (seeds,), as in `COLUMNS`; `judge` adds the rest."""
    low, high = bootstrap_interval(mine - theirs)
    return {
        "difference": (mine - theirs).mean(),
        "low": low,
        "high": high,
        "p": p_of_mean(mine - theirs),
        "wins": int((mine > theirs).sum()),
    }


def budget(spec: TrialSpec) -> str:
    """What a comparison holds equal, SAE and training, as words and four hex digits over it all."""
    same = {"sae": spec.sae.model_dump(), "training": spec.training.model_dump()}
    digest = hashlib.sha256(json.dumps(same, sort_keys=True, default=list).encode()).hexdigest()
    sparsity = f"{spec.sae.sparsity}={getattr(spec.sae, spec.sae.sparsity):g}"
    return f"{spec.sae.architecture} {sparsity}, {spec.training.steps} steps [{digest[:4]}]"
