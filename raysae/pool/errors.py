"""Whose an error is. Only one of the trial's own computation ends a trial.

Everything else is no trial's doing: a full disk, an object or a process that has gone, an evaluator
that cannot be had. The trials it meets are left as their checkpoints have them.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import ray
import torch

from raysae.errors import in_words, last_line
from raysae.pool.jobs import HaltedError
from raysae.store.one_copy import LostCopyError
from raysae.training.collective import LostPeerError

T = TypeVar("T")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


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


def no_room(error: BaseException) -> str:
    """What the system says of a disk that is full, where that is why something was raised; else "".

    safetensors has it in words alone, and torch hides it behind an error of its own.
    """
    for one in _chain(error):
        for number in NO_ROOM:
            words = os.strerror(number)
            if (isinstance(one, OSError) and one.errno == number) or words in str(one):
                return words
    return ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those that it came of."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
