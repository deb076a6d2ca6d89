"""What the terminal shows while the search runs: a live table; plain lines without a terminal."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from raysae.training.spec import SPARSITY_FIELD

ENDED = ("finished", "stopped", "failed")
Snapshot = Callable[[], dict[str, Any]]


class LiveDisplay:
    """Polls the broker in a thread of its own; a context manager."""

    def __init__(
        self,
        console: Console,
        snapshot: Snapshot,
        total_trials: int,
        note: str,
        started: float,
    ) -> None:
        self._console, self._snapshot, self._note = console, snapshot, note
        self._total = total_trials
        self._started = started
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="display", daemon=True)
        self._announced: set[int] = set()

    def __enter__(self) -> LiveDisplay:
        self._thread.start()
        return self

    def expect(self, more: int) -> None:
        """So many more trials will come."""
        self._total += more

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _loop(self) -> None:
        if not self._console.is_terminal:
            while not self._stop.wait(1.0):
                self._plain(self._snapshot())
            self._plain(self._snapshot())
            return
        with Live(console=self._console, refresh_per_second=2, transient=True) as live:
            while not self._stop.wait(0.5):
                live.update(self._render(self._snapshot()))

    def _plain(self, snapshot: dict[str, Any]) -> None:
        for trial in snapshot["trials"]:
            if trial["state"] in ENDED and trial["number"] not in self._announced:
                self._announced.add(trial["number"])
                self._console.print(
                    f"[{time.time() - self._started:6.0f} s] trial {trial['number']:>3} "
                    f"{trial['state']:<8} {_score(trial):>6}  {describe(trial['spec'])}"
                    f"  {trial['rung']['status'] or trial['error']}",
                    highlight=False,
                    markup=False,
                    soft_wrap=True,
                )

    def _render(self, snapshot: dict[str, Any]) -> Group:
        trials = snapshot["trials"]
        ended = [t for t in trials if t["state"] in ENDED]
        scored = [t for t in trials if t["rung"]["score"] is not None]
        best = max(scored, key=lambda t: t["rung"]["score"], default=None)
        elapsed = time.time() - self._started
        head = Text(f"{len(ended)}/{self._total} trials, {elapsed:.0f} s", style="bold")
        if 0 < len(ended) < self._total:
            head.append(f", about {elapsed / len(ended) * (self._total - len(ended)):.0f} s left")
        if best:
            head.append(f"  best {best['rung']['score']:.3f}: {describe(best['spec'])}")
        elif not snapshot["store_ready"]:
            head.append("  starting workers, harvesting activations")
        table = Table(box=None, pad_edge=False)
        for column in ("trial", "state", "progress", "score", "loss", "L0", "configuration"):
            table.add_column(column, justify="right" if column in ("trial", "score") else "left")
        running = [t for t in trials if t["state"] == "running"]
        for trial in running + sorted(ended, key=lambda t: -t["number"])[:8]:
            table.add_row(
                str(trial["number"]),
                trial["state"],
                ProgressBar(
                    total=trial["spec"]["rungs"][-1], completed=trial.get("tokens", 0), width=20
                ),
                _score(trial),
                f"{trial['loss']:.3f}" if "loss" in trial else "",
                f"{trial['l0']:.1f}" if "l0" in trial else "",
                describe(trial["spec"]),
            )
        return Group(head, table, Text(self._note, style="dim"))


def describe(spec: dict[str, Any]) -> str:
    """A trial in a few words: method, its parameters, α and schedule, sparsity."""
    method = dict(spec["regularizer"])
    name = method.pop("name")
    parts = [name]
    if "group_update_period" in method:
        parts.append(f"period={method['group_update_period']}")
    if "n_groups" in method:
        parts.append(f"groups={method['n_groups']}")
    if spec["alpha"]:
        parts.append(f"α={spec['alpha']:.3g} {spec['alpha_schedule']['name']}")
    sae = spec["sae"]
    sparsity = SPARSITY_FIELD[sae["architecture"]]
    parts.append(f"{sparsity.removesuffix('_coefficient')}={sae[sparsity]:.3g}")
    return " ".join(parts)


def _score(trial: dict[str, Any]) -> str:
    score = trial["rung"]["score"]
    return "" if score is None else f"{score:.3f}"
