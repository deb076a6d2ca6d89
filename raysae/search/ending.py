"""How a search ends before its time: what is said of it, and how it is gone on with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raysae.errors import InterruptedSearchError, UserError, no_room
from raysae.search.interrupt import INTERRUPTED

CONFIG_FILE, ABOUT_FILE = "config.yaml", "about.json"
"""With both a search has begun: they are what `--resume` takes it up by."""


def how_to_go_on(run_dir: Path) -> str:
    """The command, or that there is nothing to go on with."""
    if all((run_dir / name).is_file() for name in (CONFIG_FILE, ABOUT_FILE)):
        return f"go on with: python run_search.py --resume {run_dir}"
    return f"nothing has begun: start it again, with --out {run_dir} or another"


def forget(run_dir: Path) -> None:
    """Nothing of a search that was refused before its first trial keeps its folder from another."""
    for name in (CONFIG_FILE, ABOUT_FILE):
        (run_dir / name).unlink(missing_ok=True)


@contextmanager
def clear_ends(run_dir: Path) -> Iterator[None]:
    """An interrupt, or a disk that is full, ends a search in one message with the way on.

    Raises:
        InterruptedSearchError: one of both.
    """
    try:
        yield
    except (UserError, InterruptedSearchError):
        raise
    except KeyboardInterrupt:
        raise InterruptedSearchError(f"interrupted; {how_to_go_on(run_dir)}", INTERRUPTED) from None
    except Exception as error:
        full = no_room(error)
        if not full:
            raise
        raise InterruptedSearchError(
            f"the search stopped: {full}; make room, then {how_to_go_on(run_dir)}", code=1
        ) from error
