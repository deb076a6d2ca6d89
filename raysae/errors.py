"""The one exception that means «the user can fix this»."""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterable

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class UserError(Exception):
    """A mistake in the input, said in one message; the command line exits with code 2."""


class InterruptedSearchError(Exception):
    """A search that stopped before its end and can be resumed; the message says how.

    The command line exits with `code`: 130 where somebody asked for it, 1 where it had to.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class FieldError(ValueError):
    """What is wrong with one field, found by a check that looks at several.

    Raised inside of pydantic's validators or by `check`; `raysae.mistakes` reads `field`.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def nearest(word: str, valid: Iterable[str]) -> str:
    """A sentence that lists the valid words and names the nearest one to `word`, if any is near."""
    choices = sorted(valid)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"valid: {', '.join(choices)}.{hint}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, "" for one without."""
    return next(iter(str(error).splitlines()), "")


def last_line(error: BaseException) -> str:
    """The last line of an error that carries a remote traceback: what was raised there."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def in_words(error: BaseException) -> str:
    """An error's type and the last line of its message, which is all of it that Ray leaves where it
    carries a remote traceback."""
    name, line = type(error).__name__, last_line(error)
    return line if name.startswith("RayTaskError(") else f"{name}: {line}"


def no_room(error: BaseException) -> str:
    """Which of its causes was a full disk or a quota that is used up; "" if none was.

    Ray and Tune keep an error of another process, and some of this one, as text; safetensors has it
    in words alone, and torch hides it behind an error of its own.
    """
    seen: list[BaseException] = []
    causes: list[BaseException | None] = [error]
    while causes:
        cause = causes.pop()
        if cause is None or cause in seen:
            continue
        seen.append(cause)
        if isinstance(cause, OSError) and cause.errno in _NO_ROOM:
            where = f": {cause.filename}" if cause.filename else ""
            return f"{os.strerror(cause.errno)}{where}"
        for number in _NO_ROOM:
            lines = [line for line in str(cause).splitlines() if os.strerror(number) in line]
            if lines:
                return lines[-1].strip()
        causes += [cause.__cause__, cause.__context__, getattr(cause, "cause", None)]
    return ""
