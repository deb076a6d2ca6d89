"""A trial at a worker: its SAEs, what it leaves in its folder, and what it tells the broker."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from raysae.analysis.seeds import mean_curve, over_seeds
from raysae.pool.artifacts import Artifacts
from raysae.pool.errors import own
from raysae.pool.folder import LAST_GOOD_FOLDER
from raysae.training.checkpoint import Checkpoints
from raysae.training.run import Progress, Rung, SAERun, TrainingDivergedError
from raysae.training.spec import TrialSpec

Probe = Callable[[Rung], dict[str, float] | None]
"""Sparse probing of a scored SAE, where it is asked for."""


@dataclass
class TrialAtWork:
    """One trial, whether it is trained alone or with others."""

    spec: TrialSpec
    folder: Path
    broker: Any
    artifacts: list[Artifacts]
    """One of each of its SAEs."""
    runs: list[SAERun] = field(default_factory=list)
    over: bool = False
    """It has ended or is saved for later, and the broker knows."""

    @property
    def number(self) -> int:
        """Of the trial."""
        return self.spec.number

    @property
    def checkpoints(self) -> Checkpoints:
        """Of all its SAEs, in its folder."""
        return Checkpoints(self.folder)

    @property
    def position(self) -> tuple[int, int]:
        """Steps trained, and step of the last rung behind it."""
        return self.runs[0].step, self.runs[0].scored_step

    def begin(self, runs: list[SAERun]) -> None:
        """Take the trial up where its checkpoint was made, or at its beginning."""
        self.checkpoints.restore(runs)
        self.runs = runs

    def tell(self, events: Sequence[Progress | Rung | TrainingDivergedError], probe: Probe) -> Any:
        """Send what has happened to its SAEs, one event each, in the order of their seeds; a
        reference to the broker's word.

        Raises:
            TrainingDivergedError: one of the SAEs diverged, and the trial with it.
        """
        rungs = []
        for event in events:
            if isinstance(event, TrainingDivergedError):
                raise event
            if isinstance(event, Rung):
                rungs.append(event)
        if not rungs:
            return self.broker.progress.remote(self.number, self._curve()[-1])
        records = [
            kept.write(run.spec, rung, probe(rung))
            for kept, run, rung in zip(self.artifacts, self.runs, rungs, strict=True)
        ]
        return self.broker.rung.remote(self.number, over_seeds(records), self._curve())

    def stop(self) -> None:
        """The broker wants no more of it: nobody will take it up again."""
        self.checkpoints.remove()
        self.over = True

    def pause(self) -> None:
        """Save it, to be taken up by a later session."""
        self.checkpoints.save(self.runs)
        self.abandon()

    def abandon(self) -> None:
        """Leave it as its last checkpoint has it, to be taken up by a later session."""
        self.over = True
        ray.get(self.broker.paused.remote(self.number))

    @contextmanager
    def alone_with_errors(self) -> Iterator[None]:
        """Whatever is raised in here ends this trial and no other, unless it is not its own."""
        try:
            yield
        except Exception as error:
            if not own(error):
                raise
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """The trial raised: its folder says where, and the broker hears of it.

        Its checkpoint stays until the broker has, and where the search is already over, for a
        later session to find out by itself.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if isinstance(error, TrainingDivergedError) and error.last_good is not None:
            error.last_good.save_model(self.folder / LAST_GOOD_FOLDER)
        log = self.folder / "error.log"
        log.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        reason = f"{type(error).__name__}: {error} (log: {log})"
        if ray.get(self.broker.fail.remote(self.number, reason, self._curve())):
            self.stop()
        else:
            self.abandon()

    def _curve(self) -> list[dict[str, Any]]:
        """The training curve so far, means over the SAEs, as plain data.

        Of the rows that all of them have: one that diverged lacks its last.
        """
        curves = [[_row(point) for point in run.curve] for run in self.runs]
        rows = min(map(len, curves), default=0)
        return mean_curve([curve[:rows] for curve in curves])


def _row(point: Progress) -> dict[str, Any]:
    """A row of the training curve as plain data."""
    return {"step": point.step, "tokens": point.tokens, **point.metrics}
