"""What a search ends with: the leaderboard, the best beside the baseline, where everything is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from raysae.search.live import describe


def print_summary(
    console: Console,
    trials: pd.DataFrame,
    ended: list[dict[str, Any]],
    run_dir: Path,
    facts: dict[str, Any],
) -> None:
    """Print the result of a search.

    Args:
        trials: `raysae.analysis.tables.trials_table`.
        ended: the journal's records behind it.
        run_dir: where everything is.
        facts: figures of the run: wall_seconds, first_result_seconds, busy_share, peak_gib.
    """
    specs = {record["trial"]: record["spec"] for record in ended}
    ranked = trials[trials["state"] != "failed"].sort_values(
        ["tokens", "score"], ascending=False, kind="stable"
    )
    baseline = ranked[ranked["trial"] == 0]
    shown = ranked.head(10)
    if not baseline.empty and 0 not in set(shown["trial"]):
        shown = pd.concat([shown, baseline])
    table = Table(
        title=f"Leaderboard: {len(trials)} trials, those trained longest first, then by score",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for name in ("trial", "score", "forget", "retain", "L0", "EV", "dead", "κ", "steps"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("configuration", overflow="fold")
    for _, row in shown.iterrows():
        words = describe(specs[row["trial"]])
        words += "" if row["status"] == "ok" else f" [{row['status']}]"
        words += " (baseline)" if row["trial"] == 0 else ""
        table.add_row(
            f"{row['trial']}",
            f"{row['score']:.3f}",
            _count(row["forget_correct"], row["forget_total"]),
            _count(row["retain_correct"], row["retain_total"]),
            f"{row['l0']:.1f}",
            f"{row['explained_variance']:.3f}",
            f"{row['dead_features']:.0f}",
            f"{row['condition_number']:.3g}",
            f"{row['training_steps']}",
            Text(words),
            style="bold" if row["trial"] == 0 else "",
        )
    console.print()
    console.print(table)
    for error, group in trials[trials["state"] == "failed"].groupby("error"):
        numbers = ", ".join(str(number) for number in group["trial"])
        console.print(f"failed: trial {numbers}: {error}", markup=False, highlight=False)
    finished = ranked[ranked["state"] == "finished"]
    if not finished.empty:
        best = finished.iloc[0]
        console.print(
            f"Best: trial {best['trial']}, unlearning score {best['score']:.3f}: "
            f"{describe(specs[best['trial']])}",
            style="bold green",
            highlight=False,
            soft_wrap=True,
        )
        if not baseline.empty and best["trial"] != 0:
            base = baseline.iloc[0]
            console.print(
                f"Baseline: trial 0, unlearning score {base['score']:.3f}: {describe(specs[0])} "
                f"(difference {best['score'] - base['score']:+.3f}, one seed each, the best picked "
                f"among {len(ranked)}: a lead, not a proof)",
                highlight=False,
                soft_wrap=True,
            )
    console.print(
        f"{facts['wall_seconds']:.0f} s in all, first result after "
        f"{facts['first_result_seconds']:.0f} s; {facts['busy_share']:.0%} of wall × workers "
        f"in training and scoring, peak memory {facts['peak_gib']:.1f} GiB",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"Everything is in {run_dir}", highlight=False, soft_wrap=True)
    console.print(
        "  trials.parquet, curves.parquet, conditioning.parquet (and .csv), journal.jsonl"
    )
    console.print("  best/: loads with SAE.load_from_disk; trials/NNNN/: SAE, SAEBench result, log")


def _count(correct: float, total: float) -> str:
    return "" if pd.isna(correct) else f"{correct:.0f}/{total:.0f}"
