"""Conditioning: over training, against random decoders, and against the score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from raysae.analysis.plots import COLOURS
from raysae.analysis.predictors import OUTCOMES, PREDICTORS, SENSITIVITY, outcome_of
from raysae.analysis.statistics import rank_interval
from raysae.report.run import Run
from raysae.report.style import BLACK, BLUE, GREY, ORANGE, RC, SKY, Plot, draw, log_ticks, plain

SCATTERED = ("condition_number", "effective_rank", "coherence", "forget_retain_squared_cosine")
FALLBACK = "forget_retain_overlap"
"""Scattered where a journal is older than the squared cosine."""
MOST_LINES = 150
"""Trials of a figure over training."""
SIDES = {"forget": ORANGE, "retain": BLUE, "shared": GREY}


def associations(run: Run, folder: Path) -> Plot | None:
    """Plain and partial rank correlations with the score, a panel a training step."""
    table = run.associations[~run.associations["predictor"].isin(SENSITIVITY[1:])]
    table = table[table["rho"].notna()]
    steps = sorted(table["step"].unique())[-2:]
    if not steps:
        return None
    with rc_context(RC):
        names = [name for name in PREDICTORS if name in set(table["predictor"])]
        figure = Figure(figsize=(10.5, 1.5 + 0.36 * len(names)), layout="constrained")
        panels: Any = figure.subplots(1, len(steps), sharex=True, sharey=True, squeeze=False)
        for panel, step in zip(panels.flat, steps, strict=True):
            part = table[table["step"] == step].set_index("predictor")
            kinds = (
                ("rho", "o", SKY, "rank correlation", -0.13),
                ("partial", "s", BLUE, "beyond L0, explained variance and dead features", 0.13),
            )
            for kind, marker, colour, label, offset in kinds:
                y = np.array([names.index(name) for name in part.index]) + offset
                x = part[kind].to_numpy(dtype=float)
                panel.hlines(y, part[f"{kind}_low"], part[f"{kind}_high"], color=colour, lw=1.6)
                panel.plot(
                    x, y, marker, color=colour, markersize=5.5,
                    label=label if step == steps[0] else None,
                )  # fmt: skip
            panel.axvline(0, color=BLACK, linewidth=0.9)
            first = part.iloc[0]
            panel.set_title(
                f"step {step}: {first['trials']} SAEs, {first['configurations']} configurations"
            )
            panel.set_xlabel(f"with {OUTCOMES[first['outcome']]}")
            panel.set_xlim(-1, 1)
            panel.set_yticks(range(len(names)), [PREDICTORS[name] for name in names])
            plain(panel)
        panels.flat[0].invert_yaxis()
        figure.supxlabel("rank correlation, 95 % interval")
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
    found = sorted(set(table.loc[table["evidence"], "predictor"]))
    title = (
        "What goes with the score beyond sparsity and reconstruction: "
        + ", ".join(PREDICTORS[name] for name in found)
        if found
        else "Nothing measured of conditioning is shown to predict the score beyond sparsity and "
        "reconstruction"
    )
    caption = (
        "Spearman's ρ at equal training steps; intervals by bootstrap over configurations. A "
        "square whose bar crosses 0 says: no evidence."
    )
    return draw(figure, "conditioning_predictors", title, caption, folder)


def scatter(run: Run, folder: Path) -> Plot | None:
    """Score against the main figures of conditioning at the end of training."""
    rungs = run.rungs
    if rungs.empty:
        return None
    step = rungs["step"].value_counts().sort_index(ascending=False).idxmax()
    rungs = rungs[rungs["step"] == step].merge(run.trials[["trial", "regularizer"]], on="trial")
    outcome = outcome_of(rungs)
    chosen = [name for name in SCATTERED if name in rungs and rungs[name].notna().sum() > 1]
    if len(chosen) < len(SCATTERED) and FALLBACK in rungs:
        chosen.append(FALLBACK)
    chosen = [name for name in chosen if rungs[name].notna().sum() > 1]
    if not chosen:
        return None
    with rc_context(RC):
        figure = Figure(figsize=(10.5, 3.0), layout="constrained")
        panels: Any = figure.subplots(1, len(chosen), sharey=True, squeeze=False)
        clear: list[str] = []
        measured = 0
        for panel, name in zip(panels.flat, chosen, strict=True):
            marks = panel.scatter(
                rungs[name], rungs[outcome], c=rungs["l0"], cmap="cividis", s=22, linewidth=0
            )
            rho, low, high = rank_interval(rungs[name], rungs[outcome], rungs["configuration"])
            if low > 0 or high < 0:
                clear.append(f"{'higher' if low > 0 else 'lower'} {PREDICTORS[name]}")
            measured += not np.isnan(low)
            figures = f"ρ = {rho:+.2f} [{low:+.2f}, {high:+.2f}]".replace("-", "−")
            if np.isnan(low):
                figures = "constant" if np.isnan(rho) else "too few trials for ρ"
            panel.set_title(figures)
            panel.ticklabel_format(axis="x", useOffset=False)
            panel.locator_params(axis="x", nbins=5)
            panel.set_xlabel(PREDICTORS[name])
            plain(panel)
        panels.flat[0].set_ylabel(OUTCOMES[outcome].replace(" that", "\nthat"))
        figure.colorbar(marks, ax=list(panels.flat), label="L0", fraction=0.03)
    caption = (
        f"All trials scored at step {step}; brightness: L0, which both axes may follow. ρ: rank "
        "correlation with its interval over trials, nothing held fixed."
    )
    if not measured:
        title = f"Score against conditioning: too few trials for a trend ({len(rungs)})"
    elif not clear:
        title = "By itself none of these figures of conditioning goes with the score"
    else:
        title = f"By itself, before anything is held fixed: higher scores with {', '.join(clear)}"
    return draw(figure, "conditioning_scatter", title, caption, folder)


def against_random(run: Run, folder: Path) -> Plot | None:
    """κ and coherence of the groups over the median of random rows of the same size, by step."""
    table = run.conditioning[run.conditioning["group"].isin(["all", *SIDES])]
    # Where an SAE was not scored there are no random baselines.
    table = table[table["random_condition_number_p50"].notna()].copy()
    figures = {
        "condition_number": "κ",
        "coherence": "coherence",
        "effective_rank": "effective rank",
    }
    for name in figures:
        random = pd.to_numeric(table[f"random_{name}_p50"], errors="coerce")
        table[name] = pd.to_numeric(table[name], errors="coerce") / random
    table = table[table["n_features"] > 1]
    steps = sorted(table["step"].unique())
    if not steps:
        return None
    groups = [g for g in ("all", *SIDES) if g in set(table["group"])]
    with rc_context(RC):
        figure = Figure(figsize=(10.5, 3.4), layout="constrained")
        panels: Any = figure.subplots(1, len(figures), squeeze=False)
        last = [steps[0], steps[-1]] if len(steps) > 1 else steps
        for panel, (name, label) in zip(panels.flat, figures.items(), strict=True):
            for i, step in enumerate(last):
                data = [
                    table.loc[(table["group"] == g) & (table["step"] == step), name].dropna()
                    for g in groups
                ]
                positions = np.arange(len(groups)) + (i - (len(last) - 1) / 2) * 0.36
                boxes = panel.boxplot(
                    data, positions=positions, widths=0.3, patch_artist=True, showfliers=False,
                    whis=(5, 95), medianprops={"color": BLACK},
                )  # fmt: skip
                for box in boxes["boxes"]:
                    box.set_facecolor((SKY, COLOURS[4])[i])
                    box.set_label(f"step {step}")
            panel.axhline(1, color=BLACK, linestyle="--", linewidth=0.9)
            panel.set_xticks(range(len(groups)), groups)
            panel.set_ylabel(f"{label} / random, same size")
            if name == "condition_number":
                panel.set_yscale("log")
                log_ticks(panel.yaxis)
            plain(panel)
        handles = [boxes["boxes"][0]] if len(last) == 1 else None
        _legend(figure, panels, handles)
    whole = table[(table["group"] == "all") & (table["step"] == steps[-1])]["condition_number"]
    title = (
        f"At the end of training the decoder's κ is {whole.median():.2f} times that of random "
        "directions (median of the trials)"
    )
    caption = (
        "Boxes: quartiles over trials, whiskers 5–95 %. 1 (dashed): as random unit rows, as "
        "many. forget, retain: features that fire at least three times as often on one side."
    )
    return draw(figure, "conditioning_random", title, caption, folder)


def _legend(figure: Any, panels: Any, handles: Any) -> None:
    if handles is None:
        found, labels = panels.flat[0].get_legend_handles_labels()
        by_label = dict(zip(labels, found, strict=True))
        if len(by_label) > 1:
            figure.legend(
                by_label.values(), by_label.keys(), loc="outside upper right", ncols=2,
                frameon=False,
            )  # fmt: skip


def over_training(run: Run, folder: Path) -> Plot | None:
    """κ, forget–retain squared cosine (or overlap), group stability and score over training."""
    whole = run.conditioning[run.conditioning["group"] == "all"]
    if whole.empty or run.trials.empty:
        return None
    whole = whole.merge(run.trials[["trial", "regularizer"]], on="trial")
    repeated = whole[whole.groupby(["trial", "seed"])["step"].transform("nunique") > 1]
    if repeated.empty:
        return None
    lines = sorted(repeated["trial"].unique())
    every = -(-len(lines) // MOST_LINES)
    shown = set(lines[::every]) | set(run.trials.loc[run.trials["regularizer"] == "none", "trial"])
    angle = FALLBACK if repeated["forget_retain_squared_cosine"].isna().all() else SCATTERED[-1]
    outcome = outcome_of(run.rungs)
    panels_of = [
        ("condition_number", "κ of the decoder", repeated),
        (angle, PREDICTORS[angle], repeated),
        (outcome, OUTCOMES[outcome].replace(" that", "\nthat"), run.rungs.merge(
            run.trials[["trial", "regularizer"]], on="trial")),
    ]  # fmt: skip
    stable = run.curves.dropna(subset=["group_stability"]).merge(
        run.trials[["trial", "regularizer"]], on="trial"
    )
    if not stable.empty:
        stable = stable.assign(seed=0)
        panels_of.insert(2, ("group_stability", "group stability (adjusted Rand)", stable))
    with rc_context(RC):
        figure = Figure(figsize=(10.5, 3.1), layout="constrained")
        panels: Any = figure.subplots(1, len(panels_of), squeeze=False)
        for panel, (name, label, table) in zip(panels.flat, panels_of, strict=True):
            part = table[table["trial"].isin(shown)].sort_values("step")
            part = part.assign(y=pd.to_numeric(part[name], errors="coerce"))
            for regularizer, mine in part.groupby("regularizer", sort=True):
                none = regularizer == "none"
                # One line for all of them, broken between two: an artist a trial takes minutes.
                x, y = _broken(mine)
                panel.plot(
                    x, y, "s--" if none else "o-", markersize=3, color=BLACK if none else BLUE,
                    alpha=0.8 if none else 0.35, linewidth=1, zorder=3 if none else 2,
                )  # fmt: skip
            panel.set_ylabel(label)
            panel.set_xlabel("training step")
            panel.set_xlim(0, 1.04 * repeated["step"].max())
            panel.locator_params(axis="x", nbins=5)
            plain(panel)
    # One number an SAE: how κ moved between its first and its last point.
    ordered = repeated.assign(κ=pd.to_numeric(repeated["condition_number"])).sort_values("step")
    ends = ordered.groupby(["trial", "seed"])["κ"].agg(["first", "last"])
    grew = int((ends["last"] > ends["first"]).sum())
    title = f"κ grows with training in {grew} of {len(ends)} SAEs that were measured more than once"
    caption = (
        "A line an SAE (of group stability a trial), measured at the quarters of the training and "
        "where it was scored; black squares: without a regularizer. Group stability: groups before "
        "and after a regrouping, 1 the same."
    )
    if every > 1:
        caption += f" {len(shown)} of {len(lines)} trials, evenly taken."
    return draw(figure, "conditioning_training", title, caption, folder)


def _broken(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """x and y of a line through each SAE's points, with a gap between two SAEs."""
    pieces = [
        part[["step", "y"]].to_numpy(dtype=float) for _, part in rows.groupby(["trial", "seed"])
    ]
    gap = np.full((1, 2), np.nan)
    joined = np.concatenate([piece for line in pieces for piece in (line, gap)])
    return joined[:, 0], joined[:, 1]
