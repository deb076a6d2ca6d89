"""A study's runs side by side: one row a run, means and spreads over its seeds."""

from __future__ import annotations

import pandas as pd

from raysae.analysis.statistics import bootstrap_interval

FIGURES = (
    "score", "heldout_score", "saebench_score", "l2_loss", "sparsity_loss", "loss", "penalty", "l0",
    "explained_variance", "dead_features", "condition_number", "forget_retain_overlap",
)  # fmt: skip
"""Columns of the trials table that are averaged over seeds."""

BASELINE = "none"
"""Regularizer of the run that the others are compared with."""


def runs_table(trials: pd.DataFrame) -> pd.DataFrame:
    """One row a run, in the order of the trials' numbers.

    Args:
        trials: `raysae.analysis.tables.trials_table`.

    Returns:
        `run`, `seeds` (trained to the end), `failed`, and for every figure its mean and, as
        `<figure>_std`, its sample standard deviation over seeds (NaN for one seed);
        `training_steps`, the smallest of the seeds; `zeros`, why a score is 0 where one is, with
        the number of seeds, else empty. Against the run without a regularizer, where there is one:
        `difference`, the mean over seeds of the difference of held-out scores, each seed with its
        own (same weights, same batches), `difference_low` and `difference_high`, its interval by
        bootstrap over seeds, and `ahead`, the number of seeds in which it is positive.
    """
    named = trials[trials["run"] != ""]
    done_all = named[named["state"] == "finished"]
    baseline = named.loc[named["regularizer"] == BASELINE, "run"].head(1)
    rows = []
    for run, group in named.groupby("run", sort=False):
        done = group[group["state"] == "finished"]
        row: dict[str, object] = {
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
        row |= _difference(done_all, str(run), baseline.iloc[0]) if len(baseline) else {}
        rows.append(row)
    return pd.DataFrame(rows)


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
    }
