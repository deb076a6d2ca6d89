"""TensorBoard event files of a search: a run a trial, with curves, scores and hyperparameters.

Written by the search's own process, which is idle while the workers train.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.summary import hparams

TENSORBOARD = "tensorboard"
SCORES = {
    "score": "score/search",
    "heldout_score": "score/heldout",
    "transferred_score": "score/transferred",
    "saebench_score": "score/all_questions",
}
"""Figures of a rung and the tags they are written under; those of a curve are `train/<name>`."""


CLOCK_SECONDS = 0.05
"""A file's time may lag behind the clock that the journal is written by."""


class TensorBoardLog:
    """Writes `RUN_DIR/tensorboard/NNNN`; steps are training steps.

    A trial that was written to its end before keeps its files; one that was cut off is written
    anew, from its first step.
    """

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / TENSORBOARD
        self._folder.mkdir(exist_ok=True)
        self._earlier = {path.name for path in self._folder.iterdir()}
        # Not SummaryWriter, which has a thread and a pipe a run, and no flush that waits for them.
        self._writers: dict[int, EventsWriter] = {}
        self._closed: set[int] = set()
        self._scored: dict[int, int] = {}
        self.last_step: dict[int, int] = {}
        """By trial: the last step of its curve that was written."""

    def curve(self, number: int, spec: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        """Rows of a trial's training curve; those that were written before are left out."""
        if number in self._closed:
            return
        new = [row for row in rows if row["step"] > self.last_step.get(number, -1)]
        if not new:
            return
        writer = self._writer(number, spec)
        for row in new:
            tags = {f"train/{name}": value for name, value in row.items() if name != "step"}
            _add_scalars(writer, tags, row["step"])
            self.last_step[number] = row["step"]
        writer.flush()

    def rung(self, record: dict[str, Any]) -> None:
        """A `rung` record of the journal, of a trial that is not over."""
        writer = self._writers.get(record["trial"])
        if writer is not None:
            self._scores(writer, record["trial"], record)
            writer.flush()

    def end(self, record: dict[str, Any]) -> None:
        """An `end` record of the journal: whatever is missing is written, and the files closed."""
        number, spec = record["trial"], record["spec"]
        if number in self._closed:
            return
        if number not in self._writers and self._is_complete(record):
            self._closed.add(number)
            return
        writer = self._writer(number, spec)
        self.curve(number, spec, record["curve"])
        if record["rung"]:
            self._scores(writer, number, record["rung"])
        # The summary of its end: `hparams` makes the three that TensorBoard's tab is filled with.
        _, _, ended = hparams({}, {})
        _add(writer, ended)
        writer.close()
        del self._writers[number]
        self._closed.add(number)

    def close(self) -> None:
        """Close the files of trials that are not over."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def _is_complete(self, record: dict[str, Any]) -> bool:
        """Whether an earlier start wrote the trial's files when it ended, or later."""
        folder = self._folder / f"{record['trial']:04d}"
        if folder.name not in self._earlier:
            return False
        written = max((path.stat().st_mtime for path in folder.iterdir()), default=0.0)
        return bool(written >= record["ended"] - CLOCK_SECONDS)

    def _writer(self, number: int, spec: dict[str, Any]) -> EventsWriter:
        if number not in self._writers:
            folder = self._folder / f"{number:04d}"
            if folder.name in self._earlier:
                shutil.rmtree(folder)
                self._earlier.discard(folder.name)
            folder.mkdir()
            writer = self._writers[number] = EventsWriter(str(folder / "events"))
            # Of the three summaries, that of the experiment is left out: it would list the
            # parameters of one trial, and TensorBoard collects those of all by itself.
            _, started, _ = hparams(hyperparameters(spec), {})
            _add(writer, started)
        return self._writers[number]

    def _scores(self, writer: EventsWriter, number: int, rung: dict[str, Any]) -> None:
        if rung["step"] <= self._scored.get(number, -1):  # the end repeats the last rung
            return
        self._scored[number] = rung["step"]
        # On the way only the questions that the search sees are asked; journals did not always have
        # all scores.
        scores = {tag: rung[name] for name, tag in SCORES.items() if rung.get(name) is not None}
        _add_scalars(writer, scores, rung["step"])


def _add(writer: EventsWriter, summary: Summary, step: int = 0) -> None:
    writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))


def _add_scalars(writer: EventsWriter, values: dict[str, float], step: int) -> None:
    made = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
    _add(writer, Summary(value=made), step)


def write_missing(run_dir: Path, ended: list[dict[str, Any]]) -> None:
    """Write what ended while nobody watched: the last trials of a search that was stopped.

    Args:
        run_dir: of the search.
        ended: the journal's `end` records.
    """
    log = TensorBoardLog(run_dir)
    for record in ended:
        log.end(record)


def hyperparameters(spec: dict[str, Any]) -> dict[str, bool | float | str]:
    """A `TrialSpec.to_dict()` in one level: `regularizer`, `regularizer.ema`, `alpha`, `sae.k`, …

    Lists are written as text, what is not set is left out.
    """
    flat: dict[str, bool | float | str] = {}
    for key, value in spec.items():
        if not isinstance(value, dict):
            flat[key] = value if isinstance(value, bool | int | float | str) else str(value)
            continue
        for name, inner in value.items():
            if inner is not None:
                tag = key if name == "name" else f"{key}.{name}"
                flat[tag] = inner if isinstance(inner, bool | int | float | str) else str(inner)
    return flat
