"""A trial's checkpoint on disk: whole or not there, and never the reason that a trial fails."""

from __future__ import annotations

import io
import logging
import os
import pickle
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from raysae import __version__
from raysae.training.run import SAERun

log = logging.getLogger(__name__)

CHECKPOINT_FILE = "checkpoint.pt"
LAYOUT = 2
"""Of the file; one of another layout is of another version."""
SHARE = 0.02
"""At most this share of the time goes into writing checkpoints."""


class Pace:
    """When it is time for checkpoints; one for all trials that are trained together, so that they
    are saved at the same step and can be taken up together again."""

    def __init__(self, seconds_between: float) -> None:
        """
        Args:
            seconds_between: at least so many seconds pass from one time to the next; more where
                writing takes longer than `SHARE` of that.
        """
        self._seconds = seconds_between
        self._due = time.monotonic() + seconds_between

    def is_due(self) -> bool:
        """Whether the last checkpoints are old enough."""
        return time.monotonic() >= self._due

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around the writing of checkpoints: the next ones are due in due time."""
        started = time.monotonic()
        yield
        ended = time.monotonic()
        self._due = ended + max(self._seconds, (ended - started) / SHARE)


class Checkpoints:
    """Saves the SAEs of a trial, and takes them up again; in its folder, one file."""

    def __init__(self, folder: Path) -> None:
        """
        Args:
            folder: of the trial; made when the first checkpoint is written.
        """
        self._path = folder / CHECKPOINT_FILE

    def save(self, runs: Sequence[SAERun]) -> None:
        """Write the runs' states, where `SAERun.state_dict` can be taken; the file is replaced as
        a whole.

        The file has an id of its own, by which workers that share the trial know it.

        Raises what the system or torch raises where it cannot be written; nothing is left of it.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        try:
            with partial.open("wb") as file:
                states = [run.state_dict() for run in runs]
                torch.save({**_identity(runs), "id": uuid.uuid4().hex, "runs": states}, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self._path)
        finally:
            partial.unlink(missing_ok=True)

    def restore(self, runs: Sequence[SAERun]) -> bool:
        """Bring new runs to where the checkpoint was taken; False: they begin at step 0.

        A file that is damaged, or of another spec or version, is left aside: training is
        deterministic, so starting again costs time and changes nothing.

        Workers that share the trial begin where its first one does: those that find another file
        there, as a network's file system may have it, or none, are sent its state.
        """
        saved = _of_the_first(self._read(runs), runs[0])
        if saved is None:
            return False
        for run, state in zip(runs, saved["runs"], strict=True):
            run.load_state_dict(state)
        return True

    def _read(self, runs: Sequence[SAERun]) -> dict[str, Any] | None:
        try:
            saved: dict[str, Any] = torch.load(
                self._path, map_location=runs[0].device, weights_only=True
            )
        except FileNotFoundError:
            return None
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            log.warning("%s cannot be read, the trial begins again: %s", self._path, error)
            return None
        if any(saved.get(name) != value for name, value in _identity(runs).items()):
            log.warning("%s is not of this trial, which begins again", self._path)
            return None
        return saved

    def remove(self) -> None:
        """The trial has ended: nobody will take it up again."""
        self._path.unlink(missing_ok=True)


def _of_the_first(saved: dict[str, Any] | None, run: SAERun) -> dict[str, Any] | None:
    """What the first of the trial's workers has read, on every one of them."""
    collective, device = run.collective, run.device
    if collective.size == 1:
        return saved
    mine = _place(saved)
    first = collective.broadcast(mine)
    differs = torch.tensor(float(mine != first), device=device)
    if collective.sum_(differs).item() == 0:
        return saved
    if mine != first:
        log.warning("worker %d read checkpoint %s, the first %s", collective.rank, mine, first)
    # Seldom, and then of any size: as bytes, for a device of another name.
    file = io.BytesIO()
    if collective.rank == 0:
        torch.save(saved, file)
    sent = collective.broadcast(file.getvalue())
    assert isinstance(sent, bytes)
    theirs = torch.load(io.BytesIO(sent), map_location=device, weights_only=True)
    return saved if mine == first else theirs


def _place(saved: dict[str, Any] | None) -> tuple[Any, ...] | None:
    """Which checkpoint it is, and the steps that its SAEs have behind them."""
    if saved is None:
        return None
    return saved.get("id"), [(state["step"], state["scored_step"]) for state in saved["runs"]]


def _identity(runs: Sequence[SAERun]) -> dict[str, Any]:
    specs = [run.spec.to_dict() for run in runs]
    return {"specs": specs, "version": __version__, "layout": LAYOUT}
