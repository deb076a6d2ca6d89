"""Everything that looks at a search while it runs, fed by one thread of the search's process.

Twice a second it asks the broker for the state of the trials and for new rows of their curves, and
reads what the journal has gained. None of it holds up a trial.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from raysae.journal import JOURNAL, JournalTail
from raysae.search.gauges import SearchGauges
from raysae.search.live import LiveDisplay, View, short_path
from raysae.search.progress import (
    Expected,
    Standing,
    TokenRate,
    from_journal,
    tokens,
    with_earlier,
)
from raysae.search.status import StatusFile
from raysae.search.tensorboard import TENSORBOARD, TensorBoardLog

POLL_SECONDS = 0.5
Poll = Callable[[dict[int, int]], Any]
"""Last step seen of each trial → the broker's snapshot, and rows past those steps by trial, as in
`BrokerState.rows`."""


@dataclass(frozen=True)
class _Look:
    """What one look at the search has found."""

    view: View
    rows: dict[int, list[dict[str, Any]]]
    """New rows of the curves, by trial."""
    records: list[dict[str, Any]]
    """New records of the journal."""
    tiers: list[str]
    """Where the workers that are ready have their batches from."""


class Watch:
    """Display, status file, TensorBoard and gauges of one search; a context manager."""

    def __init__(
        self,
        console: Console,
        poll: Poll,
        run_dir: Path,
        expected: Expected,
        *,
        dashboard: str | None,
        metrics: list[str],
        started: float,
        note: Callable[[], str] = lambda: "",
    ) -> None:
        """
        Args:
            console: to draw on.
            poll: asks the broker.
            run_dir: of the search.
            expected: trials that will come.
            dashboard: Ray's address, if it has one.
            metrics: addresses of the metrics endpoints of Ray's nodes.
            started: when its user started it, seconds since the epoch.
            note: says what is amiss, "" where nothing is.
        """
        self._console, self._poll, self._run_dir = console, poll, run_dir
        self._expected, self._started, self._note = expected, started, note
        self._places = (
            ("dashboard", dashboard or "not available"),
            ("curves   ", f"tensorboard --logdir {short_path(run_dir / TENSORBOARD)}"),
            ("folder   ", short_path(run_dir)),
        )
        self._status = StatusFile(run_dir, started, {"dashboard": dashboard, "metrics": metrics})
        self._journal = JournalTail(run_dir / JOURNAL)
        self._curves = TensorBoardLog(run_dir)
        self._gauges = SearchGauges(run_dir.name)
        self._rate = TokenRate()
        self._ended: dict[int, dict[str, Any]] = {}
        self._view: View | None = None
        self._said = set[str]()
        self._observers: dict[str, Callable[[_Look], None]] = {
            "what is said of the store": self._say_tiers,
            "the display": lambda look: self._display.update(look.view),
            "status.json": lambda look: self._status.update(
                look.view.standing, look.tiers, self._note()
            ),
            "the gauges": lambda look: self._gauges.update(look.view.standing),
            "TensorBoard's files": self._write_curves,
        }
        self._problems: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._display = LiveDisplay(self._console)
        self._thread.start()
        return self

    def confirm(self, trials: int) -> None:
        """The confirmation has been chosen: so many trials."""
        self._expected = Expected(self._expected.search, trials)

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        self._curves.close()
        self._display.close(self._view)
        if self._view is not None:
            self._status.update(self._view.standing, sorted(self._said), last=True)
        for problem in self._problems:
            self._console.print(problem, markup=False, highlight=False)

    def _loop(self) -> None:
        """Until told to stop; a search outlives its watcher, whose problems are told at the end."""
        try:
            while not self._stop.wait(POLL_SECONDS):
                self._look()
            self._look()
        except Exception:
            self._problems.append(f"nobody watched to the end:\n{traceback.format_exc()}")

    def _look(self) -> None:
        snapshot, rows = self._poll(self._curves.last_step)
        now = time.time()
        records = self._journal.new()
        ends = [record for record in records if record["event"] == "end"]
        self._ended |= {trial["number"]: trial for trial in from_journal(ends)}
        trials = with_earlier(snapshot["trials"], self._ended)
        rate = self._rate.update(now, sum(tokens(trial) for trial in trials))
        standing = Standing(trials, self._expected, now, rate)
        self._view = View(
            standing,
            title=self._run_dir.name,
            elapsed=now - self._started,
            places=self._places,
            note=self._note()
            or ("" if snapshot["store_ready"] else "starting workers, harvesting activations"),
        )
        look = _Look(self._view, rows, records, snapshot["tiers"])
        for name, tell in list(self._observers.items()):
            try:
                tell(look)
            except Exception:
                del self._observers[name]
                self._problems.append(f"{name} ended early:\n{traceback.format_exc()}")

    def _say_tiers(self, look: _Look) -> None:
        """A line for every tier, when the first worker uses it: nearly always there is one."""
        for tier in look.tiers:
            if tier not in self._said:
                self._said.add(tier)
                line = f"batches: from {tier}"
                self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _write_curves(self, look: _Look) -> None:
        specs = {trial["number"]: trial["spec"] for trial in look.view.standing.trials}
        for number, new in look.rows.items():
            self._curves.curve(number, specs[number], new)
        for record in look.records:
            if record["event"] == "rung":
                self._curves.rung(record)
            elif record["event"] == "end":
                self._curves.end(record)
