"""`raysae status`: where a search stands, read from its run folder. Needs neither Ray nor torch.

What has ended is in the journal. What is under way is in `status.json`, which the search replaces
once a second: it may be lost at any moment, and nothing depends on it.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from rich.console import Console
from rich.live import Live

from raysae.analysis.describe import (
    describe,
    difference_of,
    disagreement,
    why_not_asked,
    word_of,
)
from raysae.analysis.seeds import SEARCH_HALF, asked
from raysae.errors import UserError, first_line
from raysae.journal import JOURNAL, ended_trials
from raysae.run_files import read_object, read_records, require
from raysae.search.live import View, short_path
from raysae.search.progress import ENDED, Expected, Standing, from_journal

STATUS_FILE = "status.json"
STATUS_FIELDS = ("time", "over", "host", "pid", "process_started", "expected")
STATUS_ADVICE = "remove it: what has ended is in the journal"
FACTS_FILE = "facts.json"
FACTS_FIELDS = ("wall_seconds", "busy_share", "peak_gib")
FACTS_ADVICE = "remove it: only the times of the whole search are in it"
SILENT_SECONDS = 30.0
"""After so long without a word a search on another machine is taken to be gone, and one whose
trials are over to have ended without a summary."""


class StatusFile:
    """Writes `status.json`: open trials, and what only the search itself knows."""

    def __init__(self, run_dir: Path, started: float, facts: dict[str, Any]) -> None:
        """
        Args:
            run_dir: of the search.
            started: seconds since the epoch.
            facts: plain data that does not change, e.g. the dashboard's address.
        """
        self._path, self._next = run_dir / STATUS_FILE, 0.0
        process = psutil.Process()
        self._facts = {
            "started": started,
            "host": socket.gethostname(),
            "pid": process.pid,
            "process_started": process.create_time(),
            **facts,
        }

    def update(
        self, standing: Standing, tiers: Sequence[str] = (), note: str = "", *, last: bool = False
    ) -> None:
        """Replace the file, at most once a second.

        Args:
            standing: of the trials.
            tiers: of the store, that workers have their batches from.
            note: what is amiss.
            last: at once, and whatever runs has ended.
        """
        if not last and standing.now < self._next:
            return
        self._next = standing.now + 1.0
        status = self._facts | {
            "time": standing.now,
            "over": last,
            "expected": vars(standing.expected),
            "tokens_per_second": standing.tokens_per_second,
            "tiers": list(tiers),
            "note": note,
            "trials": [trial for trial in standing.trials if trial["state"] not in ENDED],
        }
        text = json.dumps(status, indent=1)
        draft = self._path.with_suffix(".tmp")
        draft.write_text(text, encoding="utf-8")
        draft.replace(self._path)  # a reader sees the old file or the new one


@dataclass(frozen=True)
class RunFolder:
    """What a run folder says of its search."""

    view: View
    state: str
    """running; finished; or stopped: it ended, or was killed, before its summary."""
    closing: tuple[str, ...]
    """Sentences under the table, for a search that is over."""


def read_status(run_dir: Path, now: float | None = None) -> RunFolder:
    """Where the search in that folder stands.

    Args:
        run_dir: of a search, running or over.
        now: seconds since the epoch; None for this moment.

    Raises:
        UserError: there is no search in that folder, or what it holds cannot be read.
    """
    now = time.time() if now is None else now
    if not any((run_dir / name).is_file() for name in (JOURNAL, STATUS_FILE)):
        found = sorted(path.parent.name for path in run_dir.glob(f"*/{JOURNAL}"))
        hint = f"; it has the run folders {', '.join(found)}" if found else ""
        raise UserError(
            f"{run_dir}: {'no run folder' if run_dir.is_dir() else 'no such folder'} "
            f"(one has a {JOURNAL}){hint}"
        )
    ended = from_journal(ended_trials(read_records(run_dir)))
    status = read_object(run_dir / STATUS_FILE, STATUS_ADVICE)
    if status:
        require(status, STATUS_FIELDS, run_dir / STATUS_FILE, STATUS_ADVICE)
    numbers = {trial["number"] for trial in ended}
    finished = _is_finished(run_dir, status)
    alive = bool(status) and not finished and _is_alive(status, now)
    state = "running" if alive else "finished" if finished else "stopped"
    open_trials = [t for t in status.get("trials", []) if t["number"] not in numbers]
    trials = ended + (open_trials if alive else [])
    ends = [trial["ended"] for trial in ended if trial["ended"] is not None]
    last = max(ends, default=status.get("time", now))
    started = status.get("started") or min((t["started"] or last for t in ended), default=last)
    standing = Standing(
        sorted(trials, key=lambda trial: trial["number"]),
        Expected(**status["expected"]) if status else Expected(_expected_trials(run_dir)),
        now,
        status.get("tokens_per_second") if alive else None,
    )
    places = [("folder", short_path(run_dir))]
    places += [("batches", f"from {tier}") for tier in status.get("tiers", [])]
    if alive and status.get("dashboard"):
        places.append(("dashboard", status["dashboard"]))
        places += [("metrics", address) for address in status.get("metrics", [])[:1]]
    if (run_dir / "tensorboard").is_dir():
        places.append(("curves", f"tensorboard --logdir {short_path(run_dir / 'tensorboard')}"))
    wall = _facts(run_dir).get("wall_seconds") if state == "finished" else None
    view = View(
        standing,
        title=run_dir.name,
        elapsed=wall or (now if alive else last) - started,
        places=tuple(places),
        over=not alive,
        note=_note(state, status) if alive or trials else f"{state} before a trial had ended",
    )
    return RunFolder(view, state, () if alive else tuple(_closing(run_dir, ended)))


def _note(state: str, status: dict[str, Any]) -> str:
    """The state, and of a running search what is amiss with it."""
    amiss = status.get("note") if state == "running" else ""
    return f"{state}, {amiss}" if amiss else state


def show_status(run_dir: Path, console: Console, *, watch: bool = False) -> None:
    """Print where the search stands; with `watch` again and again until it is over.

    Raises:
        UserError: there is no search in that folder.
    """
    folder = read_status(run_dir)
    if watch and console.is_terminal:
        with Live(folder.view, console=console, auto_refresh=False, transient=True) as live:
            while folder.state == "running":
                time.sleep(1.0)
                folder = read_status(run_dir)
                live.update(folder.view, refresh=True)
    console.print(folder.view)
    for line in folder.closing:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _closing(run_dir: Path, ended: list[dict[str, Any]]) -> list[str]:
    """What a search that is over says: errors, verdicts, times."""
    reasons: dict[str, list[str]] = {}
    for trial in ended:
        if trial["state"] == "failed":
            reasons.setdefault(trial["error"], []).append(str(trial["number"]))
    lines = [f"failed: trial {', '.join(n)}: {error}" for error, n in reasons.items()]
    stopped = [trial["step"] for trial in ended if _is_half_scored(trial)]
    if stopped:
        trials = f"{len(stopped)} trial{'' if len(stopped) == 1 else 's'}"
        lines.append(f"{trials} {why_not_asked(stopped)}")
    specs = {trial["number"]: trial["spec"] for trial in ended}
    path = run_dir / "confirmation.csv"
    try:
        lines += [_verdict(row, specs) for row in _confirmed(path)]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: broken ({type(error).__name__}: {first_line(error)}); remove it: raysae "
            f"report {run_dir} makes it again"
        ) from None
    facts = _facts(run_dir)
    if facts:
        lines.append(
            f"{facts['wall_seconds']:.0f} s in all, {facts['busy_share']:.0%} of wall × workers in "
            f"training and scoring, peak memory {facts['peak_gib']:.1f} GiB"
        )
    if (run_dir / "best" / "cfg.json").is_file():
        lines.append(f"best SAE: {short_path(run_dir / 'best')}")
    return lines


def _is_half_scored(trial: dict[str, Any]) -> bool:
    return trial["state"] == "stopped" and asked(trial["rung"]) == SEARCH_HALF


def _verdict(row: dict[str, str], specs: dict[int, dict[str, Any]]) -> str:
    """A row of the confirmation in a sentence."""
    candidate = int(row["candidate"])
    other = disagreement(row)
    return (
        f"Confirmation: trial {candidate} ({describe(specs[candidate])}) {word_of(row)} "
        f"{row['baseline']}: held-out difference {difference_of(row)}, {row['seeds']} fresh seeds"
        f"{f'; caution: {other}' if other else ''}"
    )


def _confirmed(path: Path) -> list[dict[str, str]]:
    import csv

    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _is_finished(run_dir: Path, status: dict[str, Any]) -> bool:
    """Whether the summary was written, and not by an earlier start of the same search."""
    facts = run_dir / FACTS_FILE
    return facts.is_file() and facts.stat().st_mtime >= status.get("started", 0.0)


def _is_alive(status: dict[str, Any], now: float) -> bool:
    """Whether the process that writes the file is still there, and not done with its trials.

    Between its last trial and its summary a search writes tables.
    """
    if status["over"] and now - status["time"] > SILENT_SECONDS:
        return False
    if status["host"] != socket.gethostname():
        return bool(now - status["time"] < SILENT_SECONDS)
    try:
        process = psutil.Process(status["pid"])
        same = abs(process.create_time() - status["process_started"]) < 1.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _expected_trials(run_dir: Path) -> int:
    """Trials of a search without a status file: what its configuration says, 0 for a study."""
    path = run_dir / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
        search = config.get("search", {})
        is_search = config.get("space") is not None and search.get("sampler") != "grid"
        return int(search.get("num_samples", 0)) if is_search else 0
    except (yaml.YAMLError, ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"{path}: broken ({first_line(error)}); remove it: only the number of trials to come "
            "is read from it"
        ) from None


def _facts(run_dir: Path) -> dict[str, Any]:
    """Times and memory of a search that has come to its end; {} where there are none."""
    path = run_dir / FACTS_FILE
    facts = read_object(path, FACTS_ADVICE)
    if facts:
        require(facts, FACTS_FIELDS, path, FACTS_ADVICE)
    return facts
