"""Score against what was searched, and the frontier of forgetting and retaining."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from raysae.analysis.describe import describe
from raysae.analysis.plots import COLOURS
from raysae.analysis.seeds import SEARCH_HALF, asked
from raysae.analysis.statistics import rank_interval
from raysae.report.run import Run
from raysae.report.style import BLACK, BLUE, GREY, NAMES, RC, Plot, draw, log_ticks, plain

SHOWN_FRONTIERS = 4
SHOWN_RETAIN = 0.9
"""Interventions that cost more than that are no use."""
RETAIN_GATE = 0.99
"""`raysae.unlearning.scoring.RETAIN_GATE`, whose import takes SAEBench's seconds."""


def score_against(run: Run, parameter: str, folder: Path) -> Plot | None:
    """A panel a regularizer: score against the parameter; None where it was not searched.

    A study has searched nothing, so that its score is that on all questions, where all were asked.
    """
    is_study = not run.runs.empty
    on_all = is_study and bool(run.scored["saebench_score"].notna().all())
    score = "saebench_score" if on_all else "score"
    trials = run.scored.dropna(subset=[parameter])
    trials = trials[trials[parameter] > 0]
    if trials[parameter].nunique() < 2:
        return None
    methods = list(dict.fromkeys(trials.sort_values("trial")["regularizer"]))
    methods.sort(key=lambda name: -trials.loc[trials["regularizer"] == name, score].max())
    columns = min(4, len(methods))
    rows = -(-len(methods) // columns)
    with rc_context(RC):
        figure = Figure(figsize=(2.7 * columns + 0.6, 2.1 * rows + 0.6), layout="constrained")
        panels: Any = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        baseline = run.scored[run.scored["regularizer"] == "none"][score]
        for panel, method in zip(panels.flat, methods, strict=False):
            _method_panel(panel, trials, method, parameter, score)
            _baseline(panel, baseline, is_study)
            if is_study:
                seeds = trials[trials["regularizer"] == method].groupby(parameter)[score]
                panel.errorbar(
                    seeds.mean().index, seeds.mean(), yerr=seeds.std(), color=BLUE, linewidth=1.2,
                    elinewidth=0.9, capsize=2.5, alpha=0.6, zorder=2,
                )  # fmt: skip
        for i in range(len(methods), rows * columns):
            panels.flat[i].set_visible(False)
            panels.flat[i - columns].tick_params(labelbottom=True)
        figure.supxlabel(_axis(parameter))
        figure.supylabel("unlearning score")
    name = NAMES[parameter]
    spread = trials[f"{score}_std"].notna().any()
    title = f"Score against {name}: {_trend(run, parameter)}"
    caption = "Blue: trials of the panel's regularizer"
    if is_study:
        caption += ", a dot a seed, the line their mean ± standard deviation. "
    else:
        caption += (
            ", filled where trained to the end, hollow where stopped early (fewer steps, lower "
            "scores)"
        )
        caption += ", bars: standard deviation over the trial's seeds. " if spread else ". "
    if len(methods) > 1:
        caption += "Grey: all other trials. "
    if not baseline.empty and is_study:
        caption += "Dashed: mean of the seeds without a regularizer, their range shaded. "
    elif not baseline.empty:
        caption += "Dashed: the best trial without a regularizer. "
    caption += "Score of all questions" if on_all else "Score of those that the search sees"
    caption += "; panels by their best score." if len(methods) > 1 else "."
    return draw(figure, f"score_against_{parameter}", title, caption, folder)


def _baseline(panel: Any, scores: pd.Series[Any], is_study: bool) -> None:
    if scores.empty:
        return
    height = scores.mean() if is_study else scores.max()
    panel.axhline(height, color=BLACK, linestyle="--", linewidth=0.9, zorder=2)
    if is_study:
        panel.axhspan(scores.min(), scores.max(), color="0.93", zorder=0)


def _method_panel(
    panel: Any, trials: pd.DataFrame, method: str, parameter: str, score: str
) -> None:
    mine = trials["regularizer"] == method
    panel.scatter(trials[~mine][parameter], trials[~mine][score], s=9, color="0.85", zorder=1)
    for state, filled in (("finished", True), ("stopped", False)):
        part = trials[mine & (trials["state"] == state)]
        spread = pd.to_numeric(part[f"{score}_std"], errors="coerce")
        if spread.notna().any():
            panel.errorbar(
                part[parameter], part[score], yerr=spread, fmt="none", ecolor=BLUE,
                elinewidth=0.9, alpha=0.45, zorder=2,
            )  # fmt: skip
        panel.scatter(
            part[parameter],
            part[score],
            s=26,
            facecolor=BLUE if filled else "white",
            edgecolor=BLUE,
            linewidth=1.1,
            zorder=3,
        )
    if trials[parameter].max() > 8 * trials[parameter].min():
        panel.set_xscale("log")
        if trials[parameter].max() < 100 * trials[parameter].min():
            log_ticks(panel.xaxis)
    panel.set_title(f"{method} ({int(mine.sum())})")
    plain(panel)


def _axis(parameter: str) -> str:
    return {
        "alpha": "α, weight of the penalty",
        "group_update_period": "group-update period (training steps)",
    }[parameter]


def _trend(run: Run, parameter: str) -> str:
    """Over all regularizers, at the training step at which most trials were scored."""
    trials = run.searched[["trial", parameter]].dropna().set_axis(["trial", "asked"], axis=1)
    trials = trials[trials["asked"] > 0]
    rungs = run.rungs.merge(trials, on="trial")
    if rungs.empty:
        return "no trial to tell from"
    step = rungs["step"].value_counts().sort_index(ascending=False).idxmax()
    at_step = rungs[rungs["step"] == step]
    rho, low, high = rank_interval(at_step["asked"], at_step["score"], at_step["configuration"])
    count = at_step["trial"].nunique()
    if not np.isfinite(low):
        return f"too few trials for a trend ({count})"
    figures = f"ρ = {rho:+.2f} [{low:+.2f}, {high:+.2f}]".replace("-", "−")
    figures += f", {count} trials at step {step}"
    if low > 0 or high < 0:
        return f"higher goes with {'higher' if low > 0 else 'lower'} scores ({figures})"
    over = " over all regularizers" if run.searched["regularizer"].nunique() > 2 else ""
    return f"no clear trend{over} ({figures})"


def frontier(run: Run, folder: Path) -> Plot | None:
    """What the interventions of the best trials forget and what they retain."""
    done = run.finished if not run.finished.empty else run.scored
    if done.empty:
        return None
    chosen = list(done["trial"].head(SHOWN_FRONTIERS))
    baseline = done[done["regularizer"] == "none"].head(1)["trial"]
    chosen += [trial for trial in baseline if trial not in chosen]
    markers, styles = "os^Dv", ("-", "--", "-.", ":", "-")
    with rc_context(RC):
        figure = Figure(figsize=(8.6, 4.6), layout="constrained")
        axes = figure.subplots()
        reached = 1.0
        for i, trial in enumerate(chosen):
            points = [
                (p["retain_correct"] / p["retain_total"], p["forget_correct"] / p["forget_total"])
                for p in run.results[trial]["result"]["interventions"]
            ]
            if not points:
                continue
            colour = COLOURS[i] if trial not in set(baseline) else BLACK
            front = pareto(points)
            retain, forget = zip(*points, strict=True)
            axes.scatter(retain, forget, s=16, marker=markers[i], color=colour, alpha=0.35)
            axes.plot(
                *zip(*front, strict=True),
                styles[i],
                drawstyle="steps-post",
                marker=markers[i],
                markersize=5,
                color=colour,
                label=f"trial {trial}: {describe(run.specs[trial])}",
            )
            passed = [forget for retain, forget in points if retain >= RETAIN_GATE]
            reached = min([reached, *passed])
        axes.axvspan(RETAIN_GATE, 1.002, color="0.94", zorder=0)
        axes.axvline(RETAIN_GATE, color=GREY, linewidth=0.9)
        axes.set_xlabel("retain questions still right (share)")
        axes.set_ylabel("forget questions still right (share)")
        axes.set_xlim(SHOWN_RETAIN, 1.002)
        plain(axes)
        figure.legend(loc="outside lower center", frameon=False, fontsize=8.5)
    title = (
        f"Forget–retain frontier: while {RETAIN_GATE:.0%} of the retain questions stay right, at "
        f"best {1 - reached:.0%} of the forget questions are lost"
    )
    caption = (
        "A point is one of SAEBench's interventions on a trial's SAE, lines join those that no "
        "other beats; lower is better at the same retain accuracy. Shaded: the gate within which "
        f"the score is read. {_questions(run, chosen)}, of the best trials of the search and the "
        "best without a regularizer (black)."
    )
    return draw(figure, "frontier", title, caption, folder)


def _questions(run: Run, trials: list[int]) -> str:
    """Behind the results of these trials, which are all finished or all stopped."""
    half = any(asked(run.results[trial]) == SEARCH_HALF for trial in trials)
    return "The questions that the search sees" if half else "All questions"


def pareto(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (retain, forget) points that no other beats at both, by falling retain accuracy."""
    front: list[tuple[float, float]] = []
    for retain, forget in sorted(points, key=lambda p: (-p[0], p[1])):
        if not front or forget < front[-1][1]:
            front.append((retain, forget))
    return front
