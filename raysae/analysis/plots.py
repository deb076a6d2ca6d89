"""A study's figures: a row a run, a dot a seed; and what α schedules look like.

Readable in print and by colour-blind people.
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


def plot_study(trials: pd.DataFrame, curves: pd.DataFrame, folder: Path) -> list[Path]:
    """Write a study's figures and return their paths; [] where every trial failed.

    Args:
        trials: `raysae.analysis.tables.trials_table`; those without a run's name are left out.
        curves: `raysae.analysis.tables.curves_table`.
        folder: made if it is not there.

    unlearning_score.png, l2_loss.png, sparsity_loss.png, loss.png: every seed as a dot, the mean as
    a bar; no sparsity_loss.png where SAEs choose k features and have no such loss.
    training_curves.png: mean over seeds by step, the range of the seeds shaded.
    """
    trials = trials[(trials["run"] != "") & (trials["state"] != "failed")]
    if trials.empty:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"unlearning_score": _scores(trials)}
    losses = {name: label for name, label in LOSSES.items() if trials[name].any()}
    figures |= {name: _dots(trials, {name: ""}, label) for name, label in losses.items()}
    figures["training_curves"] = _curves(trials, curves)
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


def _scores(trials: pd.DataFrame) -> Figure:
    return _dots(
        trials,
        {"score": "questions searched on", "heldout_score": "held-out questions"},
        "unlearning score",
    )


def _dots(trials: pd.DataFrame, columns: dict[str, str], label: str) -> Figure:
    """A row a run: seeds as dots, their mean as a bar; several columns beside each other."""
    runs = list(dict.fromkeys(trials["run"]))
    figure, axes = _figure(8.0, 1.2 + 0.38 * len(runs))
    for i, (column, meaning) in enumerate(columns.items()):
        offset = 0.16 * (2 * i - len(columns) + 1)
        for row, run in enumerate(runs):
            values = trials.loc[trials["run"] == run, column].to_numpy(dtype=float)
            y = np.full(len(values), row + offset)
            first = row == 0 and meaning
            axes.plot(
                values,
                y,
                "os"[i],
                color=COLOURS[i],
                markersize=5,
                alpha=0.75,
                label=meaning if first else None,
            )
            axes.plot([values.mean()], [row + offset], "|", color=COLOURS[i], markersize=14, mew=2)
        baseline = trials.loc[trials["run"] == runs[0], column].mean()
        axes.axvline(baseline, color=COLOURS[i], linewidth=0.8, linestyle=LINE_STYLES[i + 1])
    axes.set_yticks(range(len(runs)), runs)
    axes.invert_yaxis()
    axes.set_xlabel(f"{label}\ndot: a seed, bar: mean, line: mean of {runs[0]!r}")
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    if any(columns.values()):
        figure.legend(loc="outside upper center", ncols=len(columns), frameon=False)
    return figure


def _curves(trials: pd.DataFrame, curves: pd.DataFrame) -> Figure:
    runs = list(dict.fromkeys(trials["run"]))
    joined = curves.merge(trials[["trial", "run"]], on="trial")
    shown = {column: label for column, label in CURVES.items() if joined[column].any()}
    rows = -(-len(shown) // 2)
    figure = Figure(figsize=(11, 0.7 + 2.6 * rows), layout="constrained")
    panels: Any = figure.subplots(rows, 2, squeeze=False)
    for panel in panels.flat[len(shown) :]:
        panel.set_visible(False)
    for panel, (column, label) in zip(panels.flat, shown.items(), strict=False):
        for i, run in enumerate(runs):
            by_step = joined[joined["run"] == run].groupby("step")[column]
            mean, low, high = by_step.mean(), by_step.min(), by_step.max()
            colour = COLOURS[i % len(COLOURS)]
            style = LINE_STYLES[i // len(COLOURS) % len(LINE_STYLES)]
            panel.plot(
                mean.index,
                mean,
                style,
                color=colour,
                linewidth=1.3,
                label=run if column == "loss" else None,
            )
            panel.fill_between(mean.index, low, high, color=colour, alpha=0.12, linewidth=0)
        positive = joined[column][joined[column] > 0]
        if column.endswith("loss") and len(positive) and positive.max() > 20 * positive.min():
            panel.set_yscale("log")
        panel.set_xlabel("training step")
        panel.set_ylabel(label)
        panel.grid(color="0.92")
        _plain(panel)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle("mean over seeds, range shaded")
    return figure


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    _plain(axes)
    return figure, axes


def _plain(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
