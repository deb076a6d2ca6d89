"""What a search ends with: the leaderboard or the study's runs, what was confirmed, and where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from raysae.analysis.describe import (
    NOT_ASKED,
    TRANSFERRED,
    by_transferred,
    describe,
    difference_of,
    p_of,
    why_not_asked,
    word_of,
)
from raysae.analysis.statistics import SIGNIFICANT
from raysae.analysis.tables import best_first
from raysae.worlds.world import SAEBENCH

SHOWN = 10
"""Rows of the leaderboard."""


def print_summary(
    console: Console,
    trials: pd.DataFrame,
    ended: list[dict[str, Any]],
    confirmation: pd.DataFrame,
    runs: pd.DataFrame,
    run_dir: Path,
    facts: dict[str, Any],
    *,
    score_name: str = SAEBENCH,
) -> None:
    """Print the result of a search or a study.

    Args:
        console: to print to.
        trials: `raysae.analysis.tables.trials_table`.
        ended: the journal's records behind it.
        confirmation: `raysae.analysis.confirmation.verdicts`.
        runs: `raysae.analysis.runs.runs_table`; empty for a search.
        run_dir: where everything is.
        facts: figures of the run: wall_seconds, first_result_seconds, busy_share, peak_gib.
        score_name: of the score on all questions, see `raysae.worlds.world.score_name`.
    """
    specs = {record["trial"]: record["spec"] for record in ended}
    searched = trials[trials["stage"] == "search"]
    console.print()
    if not runs.empty:
        _print_runs(console, runs)
    else:
        _print_leaderboard(console, searched, specs, score_name)
    for error, group in trials[trials["state"] == "failed"].groupby("error"):
        numbers = ", ".join(str(number) for number in group["trial"])
        console.print(f"failed: trial {numbers}: {error}", markup=False, highlight=False)
    for row in confirmation.to_dict("records"):
        _say(console, _verdict(row, specs))
    if confirmation["transferred_difference"].notna().any():
        _say(console, TRANSFERRED)
    _say(
        console,
        f"{facts['wall_seconds']:.0f} s in all, first result after "
        f"{facts['first_result_seconds']:.0f} s; {facts['busy_share']:.0%} of wall × workers "
        f"in training and scoring, peak memory {facts['peak_gib']:.1f} GiB",
    )
    _say(console, f"Everything is in {run_dir}")
    _say(
        console, "  trials.parquet, curves.parquet, conditioning.parquet (and .csv), journal.jsonl"
    )
    _say(console, "  best/: loads with SAE.load_from_disk; trials/NNNN/: SAE, SAEBench result, log")


def _print_leaderboard(
    console: Console, trials: pd.DataFrame, specs: dict[int, dict[str, Any]], score_name: str
) -> None:
    ranked = best_first(trials[trials["state"] != "failed"])
    ranked = ranked.sort_values("tokens", ascending=False, kind="stable")
    baseline = ranked[ranked["trial"] == 0]
    shown = ranked.head(SHOWN)
    if not baseline.empty and 0 not in set(shown["trial"]):
        shown = pd.concat([shown, baseline])
    table = Table(
        title=f"Leaderboard: {len(trials)} trials, those trained longest first, then by score",
        caption=_caption(trials, shown, score_name),
        title_justify="left",
        caption_justify="left",
        box=None,
        pad_edge=False,
    )
    columns = (
        "trial", "score", "held-out", score_name, "forget", "retain", "L0", "EV", "dead", "κ",
        "steps",
    )  # fmt: skip
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("configuration", overflow="fold")
    for _, row in shown.iterrows():
        words = describe(specs[row["trial"]])
        words += "" if row["status"] == "ok" else f" [{row['status']}]"
        words += " (baseline)" if row["trial"] == 0 else ""
        table.add_row(
            f"{row['trial']}",
            _spread(row, "score", 3),
            _spread(row, "heldout_score", 3),
            _spread(row, "saebench_score", 3),
            _count(row["forget_correct"], row["forget_total"]),
            _count(row["retain_correct"], row["retain_total"]),
            f"{row['l0']:.1f}",
            f"{row['explained_variance']:.3f}",
            _spread(row, "dead_features", 0),
            f"{row['condition_number']:.3g}",
            f"{row['training_steps']}",
            Text(words),
            style="bold" if row["trial"] == 0 else "",
        )
    console.print(table)
    finished = trials[trials["state"] == "finished"]
    if finished.empty:
        return
    best = best_first(finished).iloc[0]
    _say(
        console,
        f"Best: trial {best['trial']}, unlearning score {_spread(best, 'score', 3)} (held-out "
        f"{_spread(best, 'heldout_score', 3)}): {describe(specs[best['trial']])}",
        style="bold green",
    )
    if not baseline.empty and best["trial"] != 0:
        base = baseline.iloc[0]
        _say(
            console,
            f"Baseline: trial 0, unlearning score {_spread(base, 'score', 3)} (held-out "
            f"{_spread(base, 'heldout_score', 3)}): {describe(specs[0])} (difference "
            f"{best['score'] - base['score']:+.3f}, {_seeds(best)} each, the best picked among "
            f"{len(ranked)}: a lead, not a proof)",
        )


def _caption(trials: pd.DataFrame, shown: pd.DataFrame, score_name: str) -> str:
    seeds = int(trials["seeds"].max())
    spread = f"; ±: standard deviation over {seeds} seeds; " if seeds > 1 else ""
    spread += "forget, retain, κ: of the seed with the median score" if seeds > 1 else ""
    why = why_not_asked(shown.loc[shown["heldout_score"].isna(), "training_steps"].tolist())
    missing = f"; {NOT_ASKED}: {why}" if why else ""
    return (
        f"score: on the half of the questions that the search sees; {score_name}: on all{spread}"
        f"{missing}"
    )


def _seeds(row: pd.Series[Any]) -> str:
    return "one seed" if row["seeds"] == 1 else f"{row['seeds']} seeds"


def _print_runs(console: Console, runs: pd.DataFrame) -> None:
    table = Table(
        title="Runs: mean ± standard deviation over seeds",
        caption="score: on the half of the questions that a search sees; held-out: on the other; "
        "− baseline: held-out, seed by seed, with its bootstrap interval; p: paired t-test over "
        f"seeds, after Holm's correction for all runs: below {SIGNIFICANT} a difference is shown",
        title_justify="left",
        caption_justify="left",
        box=None,
        pad_edge=False,
    )
    table.add_column("run", no_wrap=True)
    columns: dict[str, Callable[[pd.Series[Any]], str]] = {
        "seeds": lambda row: f"{row['seeds']}",
        "score": lambda row: _spread(row, "score", 3),
        "held-out": lambda row: _spread(row, "heldout_score", 3),
        "− baseline": _interval,
        "p": lambda row: "" if pd.isna(row.get("p_holm")) else f"{row['p_holm']:.2g}",
        "L2 loss": lambda row: _spread(row, "l2_loss", 2),
        "sparsity": lambda row: _spread(row, "sparsity_loss", 2),
        "loss": lambda row: _spread(row, "loss", 2),
        "L0": lambda row: _spread(row, "l0", 1),
        "EV": lambda row: _spread(row, "explained_variance", 3),
        "dead": lambda row: _spread(row, "dead_features", 0),
        "κ": lambda row: f"{row['condition_number']:.3g}",
        "steps": lambda row: f"{row['training_steps']}",
    }
    if not runs["sparsity_loss"].any():  # SAEs that choose k features have none
        del columns["sparsity"]
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    if runs["zeros"].any():
        table.add_column("why 0", overflow="fold")
    for _, row in runs.iterrows():
        cells = [cell(row) for cell in columns.values()]
        table.add_row(Text(str(row["run"])), *cells, *([row["zeros"]] if row["zeros"] else []))
    console.print(table)


def _verdict(row: dict[Any, Any], specs: dict[int, dict[str, Any]]) -> str:
    transferred = by_transferred(row)
    return (
        f"Confirmation: trial {row['candidate']} ({describe(specs[row['candidate']])}) "
        f"{word_of(row)} "
        f"{row['baseline']} at the same budget and sparsity: held-out score "
        f"{row['candidate_heldout']:.3f} against {row['baseline_heldout']:.3f}, difference "
        f"{difference_of(row)}, {p_of(row)}, "
        f"ahead in {row['wins']} of {row['seeds']} fresh seeds"
        f"{f'. {transferred}' if transferred else ''}"
    )


def _say(console: Console, text: str, style: str = "") -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _spread(row: pd.Series[Any], figure: str, digits: int) -> str:
    mean, spread = row[figure], row[f"{figure}_std"]
    if pd.isna(mean):
        return NOT_ASKED
    return f"{mean:.{digits}f}" + ("" if pd.isna(spread) else f" ± {spread:.{digits}f}")


def _interval(row: pd.Series[Any]) -> str:
    if pd.isna(row.get("difference")):
        return ""
    low, high = row["difference_low"], row["difference_high"]
    return f"{row['difference']:+.3f}" + ("" if pd.isna(low) else f" [{low:+.3f}, {high:+.3f}]")


def _count(correct: float, total: float) -> str:
    return "" if pd.isna(correct) else f"{correct:.0f}/{total:.0f}"
