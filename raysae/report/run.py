"""What the report is made from: a run folder, read as far as it goes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from raysae.analysis.confirmation import verdicts
from raysae.analysis.predictors import associations_table, rung_rows, rungs_table
from raysae.analysis.runs import runs_table
from raysae.analysis.tables import (
    best_first,
    conditioning_rows,
    curves_table,
    seeds_table,
    trial_row,
    trials_table,
)
from raysae.errors import UserError
from raysae.journal import JOURNAL, ended_trials
from raysae.run_files import journal_lines, problem


@dataclass(frozen=True)
class Run:
    """A run folder's records and the tables made of them."""

    folder: Path
    trials: pd.DataFrame
    seeds: pd.DataFrame
    """`raysae.analysis.tables`: `trials_table` and `seeds_table`, of the search and its
    confirmation."""
    curves: pd.DataFrame
    conditioning: pd.DataFrame
    rungs: pd.DataFrame
    """`raysae.analysis.predictors.rungs_table`."""
    associations: pd.DataFrame
    """`raysae.analysis.predictors.associations_table`."""
    confirmation: pd.DataFrame
    """`raysae.search.confirm.verdicts`."""
    runs: pd.DataFrame
    """`raysae.analysis.runs.runs_table`; empty for a search."""
    specs: dict[int, dict[str, Any]]
    """By trial."""
    results: dict[int, dict[str, Any]]
    """By trial, the record of the last rung reached; {} for one that failed before its first."""
    config: dict[str, Any]
    about: dict[str, Any]
    facts: dict[str, Any]
    """{} where the run has not come to its end."""
    gaps: list[str] = field(default_factory=list)
    """What the folder does not tell, in sentences."""

    @property
    def searched(self) -> pd.DataFrame:
        """The trials of the search, without its confirmation."""
        return self.trials[self.trials["stage"] == "search"]

    @property
    def scored(self) -> pd.DataFrame:
        """Those of them that have a score."""
        return self.searched[self.searched["state"] != "failed"]

    @property
    def finished(self) -> pd.DataFrame:
        """Those of them that were trained to the end, the best first."""
        return best_first(self.searched[self.searched["state"] == "finished"])


def read_run(folder: Path) -> Run:
    """Read a run folder; what is missing or cannot be read is said in `Run.gaps`.

    Raises:
        UserError: it is no run folder, or nothing in it can be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected the folder of a search")
    path = folder / JOURNAL
    if not path.is_file():
        raise UserError(
            f"{folder}: not a run folder: it has no {JOURNAL}, the record that every search writes"
        )
    records = journal_lines(path)
    gaps: list[str] = []
    records, ended = _readable(records, path, gaps)
    open_trials = {r["trial"] for r in records} - {r["trial"] for r in ended}
    if open_trials:
        gaps.append(f"{_count(len(open_trials), 'trial')} had a score but had not ended: left out.")
    config = _read(folder / "config.yaml", yaml.safe_load, gaps)
    about = _read(folder / "about.json", json.loads, gaps)
    facts = _read(folder / "facts.json", json.loads, gaps)
    if not facts:
        gaps.append("The run has not come to its end: this is what there is so far.")
    origin = about if {"plan", "python", "versions", "git_commit"} <= about.keys() else None
    trials, seeds = trials_table(ended, origin), seeds_table(ended, origin)
    rungs = rungs_table(records)
    return Run(
        folder=folder,
        trials=trials,
        seeds=seeds,
        curves=curves_table(ended),
        conditioning=conditioning_rows(records),
        rungs=rungs,
        associations=associations_table(rungs),
        confirmation=verdicts(ended),
        runs=runs_table(seeds[seeds["stage"] == "search"]),
        specs={record["trial"]: record["spec"] for record in ended},
        results={record["trial"]: record["rung"] for record in ended},
        config=config,
        about=about,
        facts=facts,
        gaps=gaps,
    )


def _readable(
    records: list[Any], path: Path, gaps: list[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The records, and those of ended trials, that this version can make tables of."""
    good, problems = [], []
    for record in records:
        wrong = problem(record)
        if wrong:
            problems.append(wrong)
            continue
        try:
            if record["event"] == "end":
                trial_row(record)
                if record["spec"]["stage"] == "confirmation":
                    verdicts([record])
            elif record["event"] == "rung":
                rung_rows(record)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            problems.append(f"{type(error).__name__}: {error}".splitlines()[0])
        else:
            good.append(record)
    if problems and not good:
        raise UserError(
            f"{path}: {len(problems)} records, none of which this version can read "
            f"(the first: {problems[0]}); was it written by another version of raysae?"
        )
    if problems:
        gaps.append(
            f"{_count(len(problems), 'record')} of the journal cannot be read by this version and "
            f"are left out (the first: {problems[0]})."
        )
    return good, ended_trials(good)


def _read(path: Path, parse: Callable[[str], Any], gaps: list[str]) -> dict[str, Any]:
    """A mapping from a file; {} and a gap where it is not there or broken."""
    if not path.exists():
        if path.name != "facts.json":
            gaps.append(f"{path.name} is missing.")
        return {}
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError):
        value = None
    if not isinstance(value, dict):
        gaps.append(f"{path.name} is broken and was not used.")
        return {}
    return value


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
