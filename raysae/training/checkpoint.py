"""A trial's checkpoint on disk: whole or not there, and never the reason that a trial fails."""

from __future__ import annotations

import logging
import os
import pickle
import time
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

        Raises OSError where it cannot be written.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        with partial.open("wb") as file:
            torch.save({**_identity(runs), "runs": [run.state_dict() for run in runs]}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._path)

    def restore(self, runs: Sequence[SAERun]) -> bool:
        """Bring new runs to where the checkpoint was taken; False: they begin at step 0.

        A file that is damaged, or of another spec or version, is left aside: training is
        deterministic, so starting again costs time and changes nothing.
        """
        try:
            saved: dict[str, Any] = torch.load(
                self._path, map_location=runs[0].device, weights_only=True
            )
        except FileNotFoundError:
            return False
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            log.warning("%s cannot be read, the trial begins again: %s", self._path, error)
            return False
        if any(saved.get(name) != value for name, value in _identity(runs).items()):
            log.warning("%s is not of this trial, which begins again", self._path)
            return False
        for run, state in zip(runs, saved["runs"], strict=True):
            run.load_state_dict(state)
        return True

    def remove(self) -> None:
        """The trial has ended: nobody will take it up again."""
        self._path.unlink(missing_ok=True)


def _identity(runs: Sequence[SAERun]) -> dict[str, Any]:
    specs = [run.spec.to_dict() for run in runs]
    return {"specs": specs, "version": __version__, "layout": LAYOUT}
