"""Whose an error is. Only one of the trial's own computation ends a trial.

Everything else is no trial's doing: a full disk, an object or a process that has gone, an evaluator
that cannot be had. The trials it meets are left as their checkpoints have them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import ray
import torch

from raysae.errors import in_words, last_line, no_room
from raysae.pool.jobs import HaltedError
from raysae.store.one_copy import LostCopyError
from raysae.training.collective import LostPeerError

T = TypeVar("T")


class UnavailableError(Exception):
    """What every trial needs of its worker cannot be had; the message says what, and why."""


def needed(what: str, make: Callable[[], T]) -> T:
    """What `make` returns.

    Raises:
        UnavailableError: it raised, for want of anything but memory, which the trials take.
    """
    try:
        return make()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise UnavailableError(f"{what}: {in_words(error)}") from error


def restarts(error: Exception) -> bool:
    """Whether the worker that met it must begin again, and can: another process has gone."""
    return isinstance(error, LostCopyError | LostPeerError)


def halts(error: Exception) -> str:
    """Why the search cannot go on, in words; "" where it is not so.

    It can be taken up again once there is room, or what was missing is there.
    """
    if isinstance(error, HaltedError | UnavailableError):
        return last_line(error)
    if words := no_room(error):
        return words
    return in_words(error) if isinstance(error, ray.exceptions.RayError) else ""


def own(error: Exception) -> bool:
    """Whether it ends the trial that raised it."""
    return not restarts(error) and not halts(error)
