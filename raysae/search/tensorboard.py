"""TensorBoard event files of a search: a run a trial, with curves, scores and hyperparameters.

Written by the search's own process, which is idle while the workers train.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from tensorboardX.summary import hparams

TENSORBOARD = "tensorboard"
SCORES = {
    "score": "score/search",
    "heldout_score": "score/heldout",
    "saebench_score": "score/saebench",
}
"""Figures of a rung and the tags they are written under; those of a curve are `train/<name>`."""


class TensorBoardLog:
    """Writes `RUN_DIR/tensorboard/NNNN`; steps are training steps.

    A trial that ended under an earlier start of the same search keeps its files; one that was cut
    off then is written anew, from its first step.
    """

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / TENSORBOARD
        self._folder.mkdir(exist_ok=True)
        self._earlier = {path.name for path in self._folder.iterdir()}
        self._writers: dict[int, SummaryWriter] = {}
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
            for name, value in row.items():
                if name not in ("step", "tokens"):
                    writer.add_scalar(f"train/{name}", value, row["step"])
            writer.add_scalar("train/tokens", row["tokens"], row["step"])
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
        if f"{number:04d}" in self._earlier and number not in self._writers:
            self._closed.add(number)
            return
        writer = self._writer(number, spec)
        self.curve(number, spec, record["curve"])
        if record["rung"]:
            self._scores(writer, number, record["rung"])
        # The summary of its end: `hparams` makes the three that TensorBoard's tab is filled with.
        _, _, ended = hparams({}, {})
        writer.file_writer.add_summary(ended)
        writer.close()
        del self._writers[number]
        self._closed.add(number)

    def close(self) -> None:
        """Close the files of trials that are not over."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def _writer(self, number: int, spec: dict[str, Any]) -> SummaryWriter:
        if number not in self._writers:
            folder = self._folder / f"{number:04d}"
            if folder.name in self._earlier:
                shutil.rmtree(folder)
                self._earlier.discard(folder.name)
            writer = self._writers[number] = SummaryWriter(str(folder), flush_secs=10)
            # Of the three summaries, that of the experiment is left out: it would list the
            # parameters of one trial, and TensorBoard collects those of all by itself.
            _, started, _ = hparams(hyperparameters(spec), {})
            writer.file_writer.add_summary(started)
        return self._writers[number]

    def _scores(self, writer: SummaryWriter, number: int, rung: dict[str, Any]) -> None:
        if rung["step"] <= self._scored.get(number, -1):  # the end repeats the last rung
            return
        self._scored[number] = rung["step"]
        for name, tag in SCORES.items():
            writer.add_scalar(tag, rung[name], rung["step"])


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
