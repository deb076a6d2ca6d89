"""A study's runs side by side: one row a run, means and spreads over its seeds."""

from __future__ import annotations

import pandas as pd

FIGURES = (
    "score", "heldout_score", "saebench_score", "l2_loss", "sparsity_loss", "loss", "penalty", "l0",
    "explained_variance", "dead_features", "condition_number", "forget_retain_overlap",
)  # fmt: skip
"""Columns of the trials table that are averaged over seeds."""


def runs_table(trials: pd.DataFrame) -> pd.DataFrame:
    """One row a run, in the order of the trials' numbers.

    Args:
        trials: `raysae.analysis.tables.trials_table`.

    Returns:
        `run`, `seeds` (trained to the end), `failed`, and for every figure its mean and, as
        `<figure>_std`, its sample standard deviation over seeds (NaN for one seed);
        `training_steps`, the smallest of the seeds; `zeros`, why a score is 0 where one is, with
        the number of seeds, else empty.
    """
    rows = []
    for run, group in trials[trials["run"] != ""].groupby("run", sort=False):
        done = group[group["state"] != "failed"]
        row: dict[str, object] = {
            "run": run,
            "seeds": len(done),
            "failed": len(group) - len(done),
            "training_steps": done["training_steps"].min() if len(done) else 0,
        }
        for figure in FIGURES:
            row[figure] = done[figure].mean()
            row[f"{figure}_std"] = done[figure].std()
        zero = done[done["score"] == 0]["status"].value_counts()
        row["zeros"] = ", ".join(f"{count} × {status}" for status, count in zero.items())
        rows.append(row)
    return pd.DataFrame(rows)
