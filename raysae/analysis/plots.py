"""A study's figures: a row a run, a dot a seed; and what α schedules look like.

Of a search a row is a regularizer and a dot a trial. Readable in print and by colour-blind people.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe & Ito (2008): told apart by people with any common colour-vision deficiency, and in grey
# together with the line styles.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINE_STYLES = ("-", "--", ":", "-.")
LOSSES = {
    "l2_loss": "L2 loss (squared error a token, scaled activations)",
    "sparsity_loss": "sparsity loss a token",
    "loss": "total loss a token, penalty included",
}
CURVES = {
    "loss": "total loss",
    "l2_loss": "L2 loss",
    "sparsity_loss": "sparsity loss",
    "l0": "L0",
    "explained_variance": "explained variance",
    "penalty": "penalty",
}
DPI = 150


def plot_study(
    trials: pd.DataFrame, curves: pd.DataFrame, folder: Path, by: str = "run"
) -> list[Path]:
    """Write a study's figures and return their paths; [] where every trial failed.

    Args:
        trials: `raysae.analysis.tables.trials_table`; those without a run's name are left out.
        curves: `raysae.analysis.tables.curves_table`.
        folder: made if it is not there.
        by: column of `trials` that names the rows: "run", or "regularizer" for a search.

    unlearning_score.png, l2_loss.png, sparsity_loss.png, loss.png: every trial as a dot, hollow
    where it was stopped early, mean and standard deviation of the others as a bar; no
    sparsity_loss.png where SAEs choose k features and have no such loss. training_curves.png: mean
    by step of the trials of a row that were trained furthest, their range shaded.
    """
    trials = trials[(trials[by] != "") & (trials["state"] != "failed")]
    if trials.empty:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"unlearning_score": _scores(trials, by)}
    losses = {name: label for name, label in LOSSES.items() if trials[name].any()}
    figures |= {name: _dots(trials, by, {name: ""}, label) for name, label in losses.items()}
    figures["training_curves"] = _curves(trials, curves, by)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=DPI)
    return paths


def plot_schedules(
    factors: Mapping[str, Sequence[float]], overlap: Sequence[float], target: float
) -> Figure:
    """What α schedules do over a run: their factor on α by step, above the overlap that they saw.

    Args:
        factors: of each schedule by name, one a step.
        overlap: forget–retain overlap in [0, 1], one a step.
        target: the overlap aimed at.
    """
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for i, (name, values) in enumerate(factors.items()):
        style = LINE_STYLES[i % len(LINE_STYLES)]
        upper.plot(values, style, color=COLOURS[i % len(COLOURS)], linewidth=1.8, label=name)
    upper.set_ylabel("factor on α")
    upper.set_ylim(bottom=0)
    lower.plot(overlap, color=COLOURS[-1], linewidth=1.3)
    lower.axhline(target, color="0.5", linewidth=0.8, linestyle="--")
    lower.annotate("target", (0, target), (2, 2), textcoords="offset points", color="0.4")
    lower.set_ylim(0, 1)
    lower.set_ylabel("forget–retain\noverlap")
    lower.set_xlabel("training step")
    for axes in (upper, lower):
        axes.grid(color="0.92")
        _plain(axes)
    figure.legend(loc="outside upper center", ncols=len(factors), frameon=False)
    return figure


def furthest(trials: pd.DataFrame, curves: pd.DataFrame, by: str) -> pd.DataFrame:
    """The curves of the trials that were trained as far as any of their row, with the row's name:
    a mean over trials of which some end on the way would jump where they do."""
    if trials.empty or curves.empty:
        return curves.head(0).assign(**{by: ""})
    joined = curves.merge(trials[["trial", by]], on="trial")
    reached = joined.groupby("trial")["step"].transform("max")
    return joined[reached == reached.groupby(joined[by]).transform("max")]


def _scores(trials: pd.DataFrame, by: str) -> Figure:
    """Trials that were stopped early have no held-out score."""
    columns = {"score": "questions searched on", "heldout_score": "held-out questions"}
    columns = {name: words for name, words in columns.items() if trials[name].notna().any()}
    return _dots(trials, by, columns, "unlearning score")


def _dots(trials: pd.DataFrame, by: str, columns: dict[str, str], label: str) -> Figure:
    """A row a run: seeds as dots, mean ± standard deviation as a bar; columns beside each other."""
    runs = list(dict.fromkeys(trials[by]))
    # Those trained to the end, where any was.
    counted = {"finished"} & set(trials["state"]) or {"stopped"}
    figure, axes = _figure(8.0, 1.2 + 0.38 * len(runs))
    for i, (column, meaning) in enumerate(columns.items()):
        offset = 0.16 * (2 * i - len(columns) + 1)
        for row, run in enumerate(runs):
            part = trials[trials[by] == run]
            y = row + offset
            for stopped, face in ((True, "none"), (False, COLOURS[i])):
                values = part.loc[(part["state"] == "stopped") == stopped, column]
                first = row == 0 and not stopped and meaning
                axes.plot(
                    values,
                    np.full(len(values), y),
                    "os"[i],
                    color=COLOURS[i],
                    markerfacecolor=face,
                    markersize=5,
                    alpha=0.75,
                    label=meaning if first else None,
                )
            whole = part.loc[part["state"].isin(counted), column]
            if len(whole):
                axes.plot([whole.mean()], [y], "|", color=COLOURS[i], markersize=14, mew=2)
            if len(whole) > 1:
                ends = [whole.mean() - whole.std(), whole.mean() + whole.std()]
                axes.plot(ends, [y, y], color=COLOURS[i], linewidth=1.5, alpha=0.6)
        of_first = (trials[by] == runs[0]) & trials["state"].isin(counted)
        baseline = trials.loc[of_first, column].mean()
        axes.axvline(baseline, color=COLOURS[i], linewidth=0.8, linestyle=LINE_STYLES[i + 1])
    axes.set_yticks(range(len(runs)), runs)
    axes.set_ylim(len(runs) - 0.5, -0.5)  # downwards, and room for the marks of few rows
    dot = "a seed" if by == "run" else "a trial"
    if len(set(trials["state"])) > 1:
        dot += "; hollow: stopped early, not in the mean"
    axes.set_xlabel(
        f"{label}\ndot: {dot}\nbar: mean ± standard deviation, line: mean of {runs[0]!r}"
    )
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    if any(columns.values()):
        figure.legend(loc="outside upper center", ncols=len(columns), frameon=False)
    return figure


def _curves(trials: pd.DataFrame, curves: pd.DataFrame, by: str) -> Figure:
    runs = list(dict.fromkeys(trials[by]))
    joined = furthest(trials, curves, by)
    shown = {column: label for column, label in CURVES.items() if joined[column].any()}
    rows = -(-len(shown) // 2)
    figure = Figure(figsize=(11, 0.7 + 2.6 * rows), layout="constrained")
    panels: Any = figure.subplots(rows, 2, squeeze=False)
    for panel in panels.flat[len(shown) :]:
        panel.set_visible(False)
    # One pass over the curves for all panels: of a thousand trials they have tens of thousands.
    steps = joined.groupby([by, "step"])[list(shown)].agg(["mean", "min", "max"])
    for panel, (column, label) in zip(panels.flat, shown.items(), strict=False):
        for i, run in enumerate(runs):
            if run not in steps.index:
                continue
            by_step = steps.loc[run][column]
            colour = COLOURS[i % len(COLOURS)]
            style = LINE_STYLES[i // len(COLOURS) % len(LINE_STYLES)]
            panel.plot(
                by_step.index,
                by_step["mean"],
                style,
                color=colour,
                linewidth=1.3,
                label=run if column == "loss" else None,
            )
            panel.fill_between(
                by_step.index, by_step["min"], by_step["max"], color=colour, alpha=0.12, linewidth=0
            )
        positive = joined[column][joined[column] > 0]
        if column.endswith("loss") and len(positive) and positive.max() > 20 * positive.min():
            panel.set_yscale("log")
        panel.set_xlabel("training step")
        panel.set_ylabel(label)
        panel.grid(color="0.92")
        _plain(panel)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    what = "seeds" if by == "run" else "the trials trained furthest of each regularizer"
    figure.suptitle(f"mean over {what}, range shaded")
    return figure


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    _plain(axes)
    return figure, axes


def _plain(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
