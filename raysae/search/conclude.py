"""The end of a search: tables, the best SAE with its card, the report, the summary."""

from __future__ import annotations

import json
import shutil
import time
import traceback
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console

from raysae.analysis.seeds import seed_records
from raysae.errors import last_line
from raysae.journal import JOURNAL, ended_trials, read_journal
from raysae.pool.folder import RESULT_FILE, SAE_FOLDER, TRIAL_FILE, seed_folder, trial_folder
from raysae.worlds.world import SAEBENCH


@dataclass(frozen=True)
class SearchOutcome:
    """How a search ended."""

    run_dir: Path
    trials: int
    failed: int
    first_error: str


def conclude(
    run_dir: Path,
    groups: int,
    console: Console,
    started: float,
    peak_gib: float,
) -> SearchOutcome:
    """Write everything that is made of the journal, and print the summary.

    Args:
        run_dir: of the search.
        groups: trials that trained at the same time.
        console: for the summary.
        started: of this session, seconds since the epoch.
        peak_gib: memory of everything together.
    """
    from raysae.analysis.confirmation import verdicts
    from raysae.analysis.runs import runs_table
    from raysae.analysis.tables import (
        best_first,
        curves_table,
        rename_score,
        seeds_table,
        trials_table,
        write_tables,
    )
    from raysae.model_card import write_card
    from raysae.search.summary import print_summary
    from raysae.search.tensorboard import write_missing

    records = read_journal(run_dir / JOURNAL)
    ended = ended_trials(records)
    write_tables(run_dir, records, ended)
    write_missing(run_dir, ended)
    about = json.loads((run_dir / "about.json").read_text(encoding="utf-8"))
    trials = trials_table(ended)
    seeds = seeds_table(ended)
    confirmation, study = verdicts(ended), runs_table(seeds[seeds["stage"] == "search"])
    for name, table in (("confirmation", confirmation), ("runs", study)):
        if not table.empty:
            rename_score(table, about).to_csv(run_dir / f"{name}.csv", index=False)
    if not study.empty:
        from raysae.analysis.plots import plot_study

        plot_study(trials[trials["stage"] == "search"], curves_table(ended), run_dir / "figures")
    rungs = [record for record in records if record["event"] == "rung"]
    begun = [session["started"] for session in about["sessions"]]
    wall = time.time() - started + _time_before(begun, records)
    busy = sum(record["rung"].get("train_seconds", 0.0) for record in ended)
    busy += sum(record["score_seconds"] for record in rungs)
    facts = {
        "wall_seconds": wall,
        "first_result_seconds": min((r["time"] for r in rungs), default=time.time()) - begun[0],
        "busy_share": busy / (wall * groups),
        "peak_gib": peak_gib,
    }
    finished = trials[(trials["state"] == "finished") & (trials["stage"] == "search")]
    if not finished.empty:
        best = int(best_first(finished).iloc[0]["trial"])
        copy_best(run_dir, next(record for record in ended if record["trial"] == best))
        write_card(run_dir)
    note = _report(run_dir, facts)
    whole = time.time() - started + _time_before(begun, records)
    facts |= {"wall_seconds": whole, "report_seconds": whole - wall}
    (run_dir / "facts.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    name = about.get("score_name", SAEBENCH)
    print_summary(console, trials, ended, confirmation, study, run_dir, facts, score_name=name)
    console.print(note, markup=False, highlight=False, soft_wrap=True)
    failed = trials[trials["state"] == "failed"]
    return SearchOutcome(
        run_dir=run_dir,
        trials=len(trials),
        failed=len(failed),
        first_error="" if failed.empty else str(failed.iloc[0]["error"]),
    )


def _time_before(begun: list[float], records: list[dict[str, Any]]) -> float:
    """Seconds of all sessions but the last, each from its start to its last record."""
    seconds = 0.0
    for start, following in pairwise(begun):
        times = [r["time"] for r in records if start <= r["time"] < following]
        seconds += max(times, default=start) - start
    return seconds


def _report(run_dir: Path, facts: dict[str, Any]) -> str:
    """Write the report and say where it is; a search is not lost with its report."""
    from raysae.report.build import build_report

    # The page tells what the run cost up to here.
    (run_dir / "facts.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    try:
        return f"Report: {build_report(run_dir).path}"
    except Exception as error:
        (run_dir / "report_error.log").write_text(traceback.format_exc(), encoding="utf-8")
        return (
            f"The report failed: {type(error).__name__}: {last_line(error)} (log: "
            f"{run_dir / 'report_error.log'}); everything else is there. Once more: raysae report "
            f"{run_dir}"
        )


def copy_best(run_dir: Path, record: dict[str, Any]) -> None:
    """`best/` = the SAELens SAE of that trial, with its result and its spec beside it; of several
    seeds the one with the median score."""
    seeds, typical = len(seed_records(record["rung"])), record["rung"].get("typical_seed", 0)
    folder = trial_folder(run_dir, record["trial"])
    source, target = seed_folder(folder, typical, seeds), run_dir / "best"
    if target.exists():  # of an earlier session
        shutil.rmtree(target)
    shutil.copytree(source / SAE_FOLDER, target)
    for name in (RESULT_FILE, TRIAL_FILE):
        shutil.copy2(source / name, target / name)
