"""The study's five figures with titles that say what they show: of a study by run, of a search by
regularizer."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from raysae.analysis.plots import furthest, plot_study
from raysae.report.run import Run
from raysae.report.style import embed_png

LOSSES = {
    "l2_loss": "L2 loss (reconstruction)",
    "sparsity_loss": "Sparsity loss",
    "loss": "Total loss",
}


def figures(run: Run, folder: Path) -> list[dict[str, str]]:
    """Titles and pictures, in the order of `plot_study`; [] where no trial has a score."""
    by = "regularizer" if run.runs.empty else "run"
    paths = plot_study(run.searched, run.curves, folder, by)
    done = run.scored[run.scored["state"] == "finished"]
    done = run.scored if done.empty else done
    titles = {"unlearning_score": _score(done, by), "training_curves": _curves(run, by)}
    titles |= {name: _loss(done, by, name, label) for name, label in LOSSES.items()}
    return [{"caption": titles[path.stem], "image": embed_png(path)} for path in paths]


def _score(done: pd.DataFrame, by: str) -> str:
    column, what = "heldout_score", "Held-out score"
    if done[column].isna().all():  # all were stopped early
        column, what = "score", "Score on the questions searched on"
    groups = _groups(done, by, column).sort_values("mean", ascending=False)
    best = groups.index[0]
    title = f"{what}: highest mean for {best}, {_value(groups.loc[best])}"
    baseline = done.loc[done["regularizer"] == "none", by].head(1)
    if baseline.empty or baseline.iloc[0] == best:
        return title + ("" if len(groups) == 1 else f", of {len(groups)} {by}s")
    return f"{title}, against {_value(groups.loc[baseline.iloc[0]])} for {baseline.iloc[0]}"


def _loss(done: pd.DataFrame, by: str, column: str, label: str) -> str:
    groups = _groups(done, by, column).sort_values("mean")
    low, high = groups.index[0], groups.index[-1]
    if low == high:
        return f"{label} at the end of training: {_value(groups.loc[low])}"
    return (
        f"{label} at the end of training: lowest for {low}, {_value(groups.loc[low])}; highest "
        f"for {high}, {_value(groups.loc[high])}"
    )


def _curves(run: Run, by: str) -> str:
    curves = furthest(run.scored, run.curves, by).sort_values("step")
    ends = curves.groupby("trial")["loss"].agg(["first", "last"])
    left = (ends["last"] / ends["first"]).dropna()
    if left.empty:
        return "Training curves"
    return (
        f"Total loss falls to between {left.min():.1%} and {left.max():.1%} of its first logged "
        f"value ({len(left)} trials)"
        if left.max() < 1
        else f"Total loss falls in {int((left < 1).sum())} of {len(left)} trials"
    )


def _groups(done: pd.DataFrame, by: str, column: str) -> pd.DataFrame:
    groups = done.groupby(by, sort=False)[column].agg(["mean", "std", "count"])
    return groups[groups["mean"].notna()]


def _value(group: pd.Series[float]) -> str:
    spread = "" if pd.isna(group["std"]) else f" ± {group['std']:.2g}"
    return f"{group['mean']:.3g}{spread} (n = {int(group['count'])})"
