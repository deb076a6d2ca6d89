"""What the terminal shows of a search: a table while it runs; plain lines without a terminal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from raysae.analysis.describe import describe
from raysae.search.progress import Standing, is_search, tokens

STYLES = {"running": "cyan", "finished": "green", "stopped": "yellow", "failed": "red"}
WIDE, WIDEST = 100, 150
"""Terminals from so many columns on show more of a trial."""
OTHER_LINES = 8
"""Lines of a view that are no trials, a line of the shell's included."""


@dataclass(frozen=True)
class View:
    """A search at one moment, drawn to fit the terminal: one line a trial, whatever the width."""

    standing: Standing
    title: str
    elapsed: float
    """Seconds since the start."""
    places: tuple[tuple[str, str], ...] = ()
    """Where to look: name and address or folder."""
    over: bool = False
    """Show the best of the search's trials instead of the last that ended, and no time left."""
    note: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, height = options.max_width, max(options.size.height, OTHER_LINES + 6)
        yield self._headline()
        yield self._bar(width)
        best = self.standing.best
        if best is not None:
            line = Text(no_wrap=True, overflow="ellipsis")
            line.append("best  ", style="dim")
            line.append(f"trial {best['number']}  {_score(best)}  ", style="bold green")
            line.append(describe(best["spec"]))
            yield line
        if self.standing.trials:
            yield self._table(width, height - OTHER_LINES - len(self.places))
        for name, place in self.places:
            yield Text.assemble((f"{name}  ", "dim"), place, overflow="fold")

    def _headline(self) -> Text:
        standing = self.standing
        line = Text(no_wrap=True, overflow="ellipsis")
        line.append(self.title, style="bold")
        line.append(f"  {len(standing.ended)} of {standing.total} trials")
        for state in ("running", "waiting", "stopped", "failed"):
            if standing.counts[state]:
                line.append(" · ", style="dim")
                line.append(f"{standing.counts[state]} {state}", style=STYLES.get(state, ""))
        if self.note:
            line.append(f"  {self.note}", style="dim")
        return line

    def _bar(self, width: int) -> Table:
        standing = self.standing
        words = [_clock(self.elapsed)]
        left = standing.seconds_left
        if left is not None and not self.over and len(standing.ended) < standing.total:
            words.append(f"about {_clock(left)} left")
        if standing.tokens_per_second:
            words.append(f"{standing.tokens_per_second:,.0f} tokens/s")
        under_way = sum(share(trial) for trial in standing.running)
        bar = ProgressBar(
            total=standing.total,
            completed=len(standing.ended) + under_way,
            width=max(10, min(40, width // 3)),
        )
        grid = Table.grid(padding=(0, 2))
        grid.add_row(bar, Text(", ".join(words), no_wrap=True, overflow="ellipsis"))
        return grid

    def _table(self, width: int, room: int) -> Table:
        table = Table(box=None, pad_edge=False, expand=True, header_style="dim")
        table.add_column("trial", justify="right", no_wrap=True)
        table.add_column("state", no_wrap=True)
        table.add_column("trained", no_wrap=True)
        table.add_column("score", justify="right", no_wrap=True)
        figures = {"L0": "l0"}
        if width >= WIDE:
            figures = {"loss": "loss", "L0": "l0", "EV": "explained_variance"}
        if width >= WIDEST:
            figures |= {"penalty": "penalty", "α": "alpha", "dead": "dead_features"}
        for name in figures:
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("configuration", no_wrap=True, overflow="ellipsis", ratio=1)
        bar_width = 8 if width < WIDE else 16
        best = self.standing.best
        shown, hidden = self._rows(room)
        for trial in shown:
            state = trial["state"]
            words = trial["error"] if state == "failed" else describe(trial["spec"])
            status = trial["rung"].get("status")
            words += "" if status in (None, "ok") else f" [{status}]"
            words += "" if is_search(trial) else " (fresh seed)"
            table.add_row(
                str(trial["number"]),
                Text(_activity(trial), style=STYLES.get(state, "")),
                ProgressBar(total=1, completed=share(trial), width=bar_width),
                _score(trial),
                *(_figure(trial.get(key)) for key in figures.values()),
                Text(" ".join(words.split())),
                style="bold" if best is not None and trial["number"] == best["number"] else "",
            )
        if hidden:
            table.add_row("…", *[""] * (3 + len(figures)), Text(f"{hidden} more", style="dim"))
        return table

    def _rows(self, room: int) -> tuple[list[dict[str, Any]], int]:
        """Trials in the order of their rows, as many as there is room for; how many are left."""
        ended = sorted(self.standing.ended, key=lambda trial: -trial["number"])
        if self.over:
            ended = [trial for trial in ended if is_search(trial)]
            ended.sort(key=lambda trial: -(trial["rung"].get("score") or 0.0))
        trials = [*self.standing.running, *ended]
        shown = trials[: max(room, 3)]
        best = self.standing.best
        if best is not None and best not in shown:
            shown[-1] = best
        return shown, len(trials) - len(shown)


class LiveDisplay:
    """Draws one view after the other over the last; without a terminal a line for every end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._announced: set[int] = set()
        if console.is_terminal:
            self._live.start()

    def update(self, view: View) -> None:
        """Show the view; call it from one thread."""
        if self._console.is_terminal:
            self._live.update(view, refresh=True)
            return
        for trial in view.standing.ended:
            if trial["number"] not in self._announced:
                self._announced.add(trial["number"])
                self._console.print(
                    f"[{view.elapsed:6.0f} s] trial {trial['number']:>3} "
                    f"{trial['state']:<8} {_score(trial):>6}  {describe(trial['spec'])}"
                    f"  {trial['rung'].get('status') or trial['error']}",
                    highlight=False,
                    markup=False,
                    soft_wrap=True,
                )

    def close(self, view: View | None) -> None:
        """Take the table away; what was not reached is said, so that a stop is seen as one."""
        self._live.stop()
        if view is None or len(view.standing.ended) >= view.standing.total:
            return
        standing = view.standing
        line = Text(f"Stopped after {_clock(view.elapsed)}: ")
        line.append(f"{len(standing.ended)} of {standing.total} trials have ended")
        if standing.best is not None:
            line.append(f"; best so far: trial {standing.best['number']}, {_score(standing.best)}")
        self._console.print(line, soft_wrap=True)


def _activity(trial: dict[str, Any]) -> str:
    """The state; a running trial that has reached a rung without its score is being scored."""
    at_rung = trial.get("tokens") in trial["spec"]["rungs"]
    unscored = trial["rung"].get("tokens") != trial.get("tokens")
    scoring = trial["state"] == "running" and at_rung and unscored
    return "scoring" if scoring else str(trial["state"])


def share(trial: dict[str, Any]) -> float:
    """How far a trial has been trained, 0 to 1."""
    return float(min(1.0, tokens(trial) / max(1, trial["spec"]["rungs"][-1])))


def short_path(path: Path) -> str:
    """Relative to the working directory where that is shorter."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if abs(value) < 1e4 else f"{value:.1e}"


def _score(trial: dict[str, Any]) -> str:
    score = trial["rung"].get("score")
    return "" if score is None else f"{score:.3f}"
