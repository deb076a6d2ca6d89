"""Optuna's own figures of the search, as interactive plots; and fANOVA importances beside chance.

A parameter that several methods have (`grouped.group_update_period`, …) is one parameter here:
Optuna keeps them apart, which would leave a handful of trials to each.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from raysae.analysis.describe import describe
from raysae.analysis.statistics import SIGNIFICANT, holm, rank_interval
from raysae.report import fanova
from raysae.report.fanova import Importances
from raysae.report.run import Run
from raysae.report.style import BLUE, NAMES, RC, Plot, draw, plain

if TYPE_CHECKING:
    import optuna
    import plotly.graph_objects as go

STUDY_FILE, STUDY_NAME = "optuna.journal", "raysae"
COMMON = ("regularizer", "alpha", "alpha_schedule", "group_update_period")
MIN_TRIALS = 10
"""Below, importances and contours draw pictures of nothing."""
MOST_LINES = 200
"""Of the parallel coordinates: every line is a trace of its own, of kilobytes."""
MOST_DOTS = 150
"""Of a contour: its grid has a cell for every pair of values."""


@dataclass(frozen=True)
class Interactive:
    """A plotly figure of the report."""

    name: str
    title: str
    caption: str
    figure: go.Figure


def load_study(run: Run) -> optuna.Study | None:
    """Optuna's study with merged parameters and the scored trials; None where there is none.

    Appends to `run.gaps` why there is none.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path = run.folder / STUDY_FILE
    if not path.is_file():
        if run.runs.empty:
            run.gaps.append(f"{STUDY_FILE} is missing: no figures of the search.")
        return None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("optuna").setLevel(logging.ERROR)
    try:
        stored = optuna.load_study(
            study_name=STUDY_NAME, storage=JournalStorage(JournalFileBackend(str(path)))
        )
        found = stored.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    except Exception as error:  # whatever a broken file makes Optuna raise
        run.gaps.append(f"{STUDY_FILE} cannot be read ({type(error).__name__}): {error}")
        return None
    scored = set(run.scored["trial"])
    trials = [trial for trial in found if trial.number in scored and trial.value is not None]
    if not trials:
        return None
    study = optuna.create_study(direction="maximize")
    ranges = _ranges(trials)
    for trial in trials:
        names = {name: _merged(name) for name in trial.params}
        merged = {new: trial.params[old] for old, new in names.items()}
        study.add_trial(
            optuna.trial.create_trial(
                value=trial.value,
                params=merged,
                distributions={name: ranges[name] for name in merged},
                user_attrs={"trial": trial.number},
            )
        )
    return study


@dataclass(frozen=True)
class AtOneStep:
    """The trials of a study with the scores that they had at one training step.

    Scores rise with training: over scores of trials that were stopped early and of others, a
    parameter would seem to matter by which trials the scheduler stopped.
    """

    step: int
    study: optuna.Study

    @property
    def where(self) -> str:
        """In words."""
        return f"the scores of {len(self.study.trials)} trials at step {self.step}"


def at_one_step(run: Run, study: optuna.Study) -> AtOneStep | None:
    """At the step at which most trials were scored, the latest of such; None where none was."""
    trials = {trial.user_attrs["trial"]: trial for trial in study.trials}
    rungs = run.rungs[run.rungs["trial"].isin(trials)]
    told = rungs.groupby(["step", "trial"])["objective"].mean()
    counts = told.groupby(level="step").size()
    if counts.empty:
        return None
    step = int(counts[counts == counts.max()].index.max())
    scores = told.loc[step]
    chosen = [number for number in trials if number in scores.index]
    return AtOneStep(step, _study_of([trials[n] for n in chosen], scores[chosen].to_numpy()))


def _study_of(trials: list[Any], values: np.ndarray) -> optuna.Study:
    """A study of these trials with other values."""
    import optuna

    study = optuna.create_study(direction="maximize")
    study.add_trials(
        [
            optuna.trial.create_trial(
                value=float(value),
                params=trial.params,
                distributions=trial.distributions,
                user_attrs=trial.user_attrs,
            )
            for trial, value in zip(trials, values, strict=True)
        ]
    )
    return study


def _merged(name: str) -> str:
    """`grouped.group_update_period` → `group_update_period`, `sae.k` → `k`; others keep theirs."""
    last = name.rsplit(".", 1)[-1]
    return last if last in COMMON or name.startswith(("sae.", "training.")) else name


def _ranges(trials: list[Any]) -> dict[str, Any]:
    """By merged name, a distribution that holds all of its methods'."""
    import optuna

    ranges: dict[str, Any] = {}
    for trial in trials:
        for name, mine in trial.distributions.items():
            merged = _merged(name)
            other = ranges.get(merged)
            if other is None or isinstance(mine, optuna.distributions.CategoricalDistribution):
                ranges[merged] = mine
            elif (mine.low, mine.high) != (other.low, other.high):
                ranges[merged] = type(mine)(
                    min(mine.low, other.low), max(mine.high, other.high), log=mine.log and other.log
                )
    return ranges


def parameters(study: optuna.Study) -> list[str]:
    """Parameters that more than one method shares, those of the penalty first."""
    trials = study.trials  # a copy at every call
    found = dict.fromkeys(name for trial in trials for name in trial.params)
    own = [name for name in found if name not in COMMON and "." not in name]
    varied = [name for name in (*COMMON, *own) if name in found]
    return [name for name in varied if len({t.params.get(name) for t in trials}) > 1]


def history(run: Run, study: optuna.Study) -> Interactive:
    """Score by trial and the best so far."""
    import optuna.visualization as visualization

    figure = visualization.plot_optimization_history(study, target_name="score")
    numbers = [trial.user_attrs["trial"] for trial in study.trials]
    words = [f"trial {n}: {describe(run.specs[n])}" for n in numbers]
    values = np.array([trial.value for trial in study.trials], dtype=float)
    best = np.maximum.accumulate(values)
    points, line = figure.data[0], figure.data[1]
    points.update(x=numbers, text=words, hovertemplate="%{text}<br>%{y:.3f}<extra></extra>")
    points.update(name="trial")
    line.update(x=numbers, y=best, line={"color": "black", "shape": "hv"}, name="best so far")
    stopped = set(run.searched.loc[run.searched["state"] == "stopped", "trial"])
    symbols = ["circle-open" if n in stopped else "circle" for n in numbers]
    points.update(marker={"symbol": symbols, "size": 9, "color": BLUE})
    last = int(np.argmax(best == best[-1]))
    figure.update_layout(xaxis_title="trial", yaxis_title="score told to the sampler")
    title = (
        f"The best score, {best[-1]:.3f}, came with trial {numbers[last]}, the {_nth(last + 1)} of "
        f"{len(numbers)}"
    )
    caption = "Filled: trained to the end. Hollow: stopped early, its last score. Point at a mark."
    return Interactive("history", title, caption, figure)


def parallel(study: optuna.Study) -> Interactive | None:
    """A line a trial through the parameters that most trials have."""
    import optuna
    import optuna.visualization as visualization

    names = [name for name in parameters(study) if name != "group_update_period"]
    if len(names) < 2:
        return None
    few = optuna.create_study(direction="maximize")
    few.add_trials(sorted(study.trials, key=lambda t: t.value or 0.0)[-MOST_LINES:])
    figure = visualization.plot_parallel_coordinate(few, params=names, target_name="score")
    figure.update_layout(height=460, margin={"l": 60, "r": 90})
    caption = "A line a trial, darker is better; None: it has no such parameter."
    return Interactive("parallel", _best_quarter(study), caption, figure)


def slices(at: AtOneStep) -> Interactive | None:
    """Score against each parameter, at one step."""
    import optuna.visualization as visualization

    study = at.study
    names = parameters(study)
    if not names:
        return None
    figure = visualization.plot_slice(study, params=names, target_name="score")
    for trace in figure.data:
        trace.x = [value.strip("'") if isinstance(value, str) else value for value in trace.x]
    figure.update_xaxes(tickangle=-60, automargin=True)
    figure.update_layout(height=430, width=None)
    caption = (
        "A dot a trial, the later the darker: what the sampler came to prefer. Shown are "
        f"{at.where}, at which most were scored: last scores of trials stopped early and of others "
        "do not compare."
    )
    return Interactive("slice", f"{_trends(study, names)} (step {at.step})", caption, figure)


def contour(study: optuna.Study) -> Interactive | None:
    """Score over pairs of numeric parameters, interpolated between trials."""
    import optuna
    import optuna.visualization as visualization

    trials = study.trials
    categorical = optuna.distributions.CategoricalDistribution
    numeric = [
        name for name in parameters(study)
        if not any(isinstance(t.distributions.get(name), categorical) for t in trials)
    ][:3]  # fmt: skip
    complete = [t for t in trials if set(numeric) <= t.params.keys()]
    if len(numeric) > 2 and len(complete) < MIN_TRIALS:
        numeric = numeric[:1] + numeric[2:]
    if len(numeric) < 2 or len(trials) < MIN_TRIALS:
        return None
    few = optuna.create_study(direction="maximize")
    few.add_trials(trials[:: -(-len(trials) // MOST_DOTS)])
    figure = visualization.plot_contour(few, params=numeric, target_name="score")
    figure.update_layout(height=420 if len(numeric) == 2 else 640)
    caption = "Interpolated between the trials (dots): believe it near dots only. Darker is better."
    if len(trials) > MOST_DOTS:
        caption += f" {len(few.trials)} of {len(trials)} trials, evenly taken."
    return Interactive("contour", _where_best(study, numeric), caption, figure)


def _quarter(study: optuna.Study) -> list[Any]:
    """The best quarter of the trials, the best first."""
    ranked = sorted(study.trials, key=lambda t: -(t.value or 0.0))
    return ranked[: -(-len(ranked) // 4)]


def _best_quarter(study: optuna.Study) -> str:
    """Which regularizer is most frequent among the best, and how frequent it is in all."""
    best, trials = _quarter(study), study.trials
    head = f"The best {len(best)} of {len(trials)} trials"
    found = Counter(t.params["regularizer"] for t in best if "regularizer" in t.params)
    everywhere = Counter(t.params.get("regularizer") for t in trials)
    if len(everywhere) < 2 or not found:
        return f"{head} have scores of {best[-1].value:.3f} to {best[0].value:.3f}"
    most = max(found.values())
    names = [name for name in found if found[name] == most]
    if len(names) > 2:
        return f"{head} are of {len(found)} regularizers, none of which has more than {most}"
    counts = " and ".join(f"{most} × {name} (of {everywhere[name]})" for name in names)
    return f"{head} are most often of one regularizer: {counts}"


def _trends(study: optuna.Study, names: list[str]) -> str:
    """Which numeric parameters the score goes with by themselves, by rank: tested together (Holm),
    since of several one has an interval without 0 by chance now and then."""
    trials = study.trials
    asked = {
        name: np.array(pairs, dtype=float).T  # (2, trials)
        for name in names
        if (pairs := [(t.params[name], t.value) for t in trials if name in t.params])
        and all(isinstance(value, int | float) for value, _ in pairs)
    }
    found = {name: rank_interval(x, y) for name, (x, y) in asked.items()}
    tested = [name for name, (_, low, _) in found.items() if np.isfinite(low)]
    p = holm(np.array([spearmanr(*asked[name]).pvalue for name in tested]))
    sure = {name for name, value in zip(tested, p, strict=True) if value < SIGNIFICANT}
    clear, unclear = [], []
    for name, (rho, low, high) in found.items():
        shown = NAMES.get(name, name)
        if name in sure:
            figures = f"ρ {rho:+.2f} [{low:+.2f}, {high:+.2f}]".replace("-", "−")
            clear.append(f"{'higher' if rho > 0 else 'lower'} {shown} ({figures})")
        else:
            unclear.append(shown)
    if not clear:
        return (
            f"By itself none of {', '.join(unclear)} shows a trend" if unclear else "Score by kind"
        )
    title = f"Higher scores go with {' and '.join(clear)}"
    return title + (f"; no clear trend in {', '.join(unclear)}" if unclear else "")


def _where_best(study: optuna.Study, names: list[str]) -> str:
    """Where the best trials lie, of those that have the parameters."""
    best = [t for t in _quarter(study) if set(names) <= t.params.keys()]
    if not best:
        return f"None of the best {len(_quarter(study))} trials has all of these parameters"
    spans = []
    for name in names:
        values = [t.params[name] for t in best]
        spans.append(f"{NAMES.get(name, name)} {min(values):.3g} to {max(values):.3g}")
    return f"{len(best)} of the best {len(_quarter(study))} trials lie here: {', '.join(spans)}"


def importances(run: Run, at: AtOneStep | None, folder: Path) -> Plot | None:
    """fANOVA importances, of the trials with a penalty and of those that regroup, beside chance."""
    trials = [] if at is None else at.study.trials
    shared = [] if at is None else parameters(at.study)
    sets = {
        "trials with a penalty": [n for n in shared if n != "group_update_period"],
        "trials that regroup": shared if "group_update_period" in shared else [],
    }
    found: dict[str, Importances] = {}
    for label, names in sets.items():
        part = [t for t in trials if set(names) <= t.params.keys()]
        values = np.array([t.value for t in part])
        if len(names) > 1 and len(part) >= MIN_TRIALS and len(np.unique(values)) > 1:
            found[f"{label} ({len(part)})"] = fanova.importances(part, values, names)
    if at is None or not found:
        run.gaps.append(
            f"Parameter importances need {MIN_TRIALS} trials with different scores at one step."
        )
        return None
    with rc_context(RC):
        rows = max(len(one.measured) for one in found.values())
        figure = Figure(figsize=(10.5, 1.2 + 0.42 * rows), layout="constrained")
        panels: Any = figure.subplots(1, len(found), sharex=True, squeeze=False)
        for panel, (label, one) in zip(panels.flat, found.items(), strict=True):
            names = sorted(one.measured, key=one.measured.__getitem__)
            panel.barh(
                [NAMES.get(name, name) for name in names], [one.measured[n] for n in names],
                color=BLUE, height=0.55, label="measured",
            )  # fmt: skip
            panel.plot(
                [one.by_chance[n] for n in names], range(len(names)), "d", color="black",
                label="as large by chance in 5 % of searches", linestyle="",
            )  # fmt: skip
            panel.set_title(label)
            panel.set_xlabel("share of the score's variance (fANOVA)")
            plain(panel)
        handles, labels = panels.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False)
    above = [
        NAMES.get(name, name)
        for name in next(iter(found.values())).above
        if all(name in one.above for one in found.values() if name in one.measured)
    ]
    title = (
        f"What the score at step {at.step} hung on: {', '.join(above)} (more than by chance)"
        if above
        else f"No parameter is shown to matter for the score at step {at.step}"
    )
    caption = (
        f"fANOVA over a forest of {fanova.TREES} trees, of {at.where}, at which most were scored. "
        "Importances sum to 1 whatever the data: of scores that are shuffled "
        f"({fanova.SHUFFLES} times) some parameter exceeds its black mark in 5 % of the searches. "
        "One below its mark is not shown to matter."
    )
    return draw(figure, "importances", title, caption, folder)


def _nth(number: int) -> str:
    if 10 <= number % 100 <= 20:
        return f"{number}th"
    return f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th') }"
