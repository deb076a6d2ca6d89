"""A study's runs side by side: one row a run, means and spreads over its seeds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from raysae.analysis.statistics import SIGNIFICANT, bootstrap_interval, holm, p_of_mean

_MEANINGS = {
    "score": "unlearning score on the half of the questions that a search sees, 0 to 1",
    "heldout_score": "the same on the other half",
    "transferred_score": "of the intervention chosen on the first half, on the other",
    "saebench_score": "SAEBench's own score, on all questions; renamed as in the trials table",
    "l2_loss": "reconstruction term at the end, summed over d_in, activations scaled to norm √d_in",
    "sparsity_loss": "L1 or L0 term at the end; 0 where k features are chosen",
    "loss": "total training loss at the end",
    "penalty": "the regularizer's penalty at the end, before α (1: as random directions)",
    "l0": "mean number of active features a token (count)",
    "explained_variance": "1 − residual variance / variance (share, at most 1)",
    "dead_features": "features that have not fired for `dead_after` steps (count)",
    "condition_number": "σ_max/σ_min of all decoder rows over the non-zero spectrum (ratio)",
    "forget_retain_overlap": "‖Q_fᵀQ_r‖²_F / min(k_f, k_r) of the selective subspaces, 0 to 1",
}

FIGURES = tuple(_MEANINGS)
"""Columns of the trials table that are averaged over seeds."""

RUN_COLUMNS: dict[str, str] = {
    "run": "name of the run",
    "seeds": "seeds trained to the end (count)",
    "failed": "seeds that failed (count)",
    "training_steps": "optimiser steps trained, the smallest of the seeds (steps)",
    **{
        name: text
        for figure, meaning in _MEANINGS.items()
        for name, text in (
            (figure, f"{meaning}; mean over seeds"),
            (f"{figure}_std", f"sample standard deviation of {figure} over seeds; nan for one"),
        )
    },
    "zeros": "why a score is 0 where one is, with the number of seeds",
    "difference": "mean over seeds of the difference of held-out scores to the run without a "
    "regularizer of the same SAE and training, seed by seed",
    "difference_low": "2.5 % of it, bootstrap over seeds; nan for one seed",
    "difference_high": "97.5 %",
    "ahead": "seeds in which the difference is above 0 (count)",
    "p": "two-sided p of a paired t-test of the difference; that of the sign test where it is the "
    "same in all seeds, 1 for one seed",
    "p_holm": "p corrected for the number of runs that have one (Holm)",
    "beats": f"whether difference_low is above 0 and p_holm below {SIGNIFICANT}",
    "worse": f"whether difference_high is below 0 and p_holm below {SIGNIFICANT}",
}
"""Columns of `runs.csv` with their meaning and unit; from `difference` on where there is such a
run."""

_SAE = ("architecture", "d_sae", "k", "l1_coefficient", "l0_coefficient")

BASELINE = "none"
"""Regularizer of the run that the others are compared with."""


def runs_table(seeds: pd.DataFrame) -> pd.DataFrame:
    """One row a run, in the order of the trials' numbers.

    Args:
        seeds: `raysae.analysis.tables.seeds_table`, of the search alone.

    Returns:
        Columns as in `RUN_COLUMNS`. Differences are taken seed by seed: same weights, same batches.
    """
    named = seeds[seeds["run"] != ""]
    done_all = named[named["state"] == "finished"]
    equal = _what_is_equal(named)
    baselines: dict[str, str] = {}
    for run in named.loc[named["regularizer"] == BASELINE, "run"].unique():
        baselines.setdefault(equal[run], run)
    rows: list[dict[str, Any]] = []
    for run, group in named.groupby("run", sort=False):
        done = group[group["state"] == "finished"]
        row: dict[str, Any] = {
            "run": run,
            "seeds": len(done),
            "failed": int((group["state"] == "failed").sum()),
            "training_steps": done["training_steps"].min() if len(done) else 0,
        }
        for figure in FIGURES:
            row[figure] = done[figure].mean()
            row[f"{figure}_std"] = done[figure].std()
        zero = done[done["score"] == 0]["status"].value_counts()
        row["zeros"] = ", ".join(f"{count} × {status}" for status, count in zero.items())
        baseline = baselines.get(equal[str(run)])
        row |= {} if baseline is None else _difference(done_all, str(run), baseline)
        rows.append(row)
    _judge([row for row in rows if "p" in row])
    return pd.DataFrame(rows)


def _judge(rows: list[dict[str, Any]]) -> None:
    """Add what depends on how many runs are compared."""
    for row, p in zip(rows, holm(np.array([row["p"] for row in rows])), strict=True):
        row["p_holm"] = float(p)
        row["beats"] = bool(row["difference_low"] > 0 and p < SIGNIFICANT)
        row["worse"] = bool(row["difference_high"] < 0 and p < SIGNIFICANT)


def _what_is_equal(named: pd.DataFrame) -> dict[str, str]:
    """By run, in words, what a comparison holds equal: SAE, its sparsity, and training."""
    fixed = [name for name in map(str, named) if name in _SAE or name.startswith("training.")]
    first = named.drop_duplicates("run").set_index("run")[fixed]
    return {str(run): repr(row.to_dict()) for run, row in first.iterrows()}


def _difference(done: pd.DataFrame, run: str, baseline: str) -> dict[str, float]:
    """Of the held-out scores of two runs, seed by seed; {} for the baseline and without a seed."""
    scores = done.pivot_table(index="seed", columns="run", values="heldout_score")
    if run == baseline or not {run, baseline} <= set(scores.columns):
        return {}
    differences = (scores[run] - scores[baseline]).dropna().to_numpy()
    if not len(differences):
        return {}
    low, high = bootstrap_interval(differences)
    return {
        "difference": float(differences.mean()),
        "difference_low": low,
        "difference_high": high,
        "ahead": int((differences > 0).sum()),
        "p": p_of_mean(differences),
    }
