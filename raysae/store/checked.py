"""What one process of a machine has compared with its checksums, for all others there.

To hash takes a second or two for every GiB and thread: a worker that did it for what the others of
its machine have looked at would keep a search waiting. What is remembered lies in the folder of the
Ray session, which every machine has of its own, and goes with it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np
import ray

from raysae.store.files import map_tensors, verify


def check_once(what: str, check: Callable[[], None]) -> None:
    """Call `check`, unless a process of this machine has done so and it did not raise; who comes
    meanwhile waits.

    Args:
        what: is checked, in words that are another's only if it is the same.
        check: raises if it is not as it should be.
    """
    marker = _marker(what)
    if marker is None:
        check()
        return
    with marker:
        fcntl.flock(marker, fcntl.LOCK_EX)
        marker.seek(0)
        if not marker.read():
            check()
            marker.write(what)


def map_checked(path: Path, checksums: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The tensors of a file, mapped, read-only, and compared with their checksums once a machine:
    again only when the file is another one, or has been written to.

    Raises:
        CorruptFileError: it is missing, truncated, or not what was written.
    """
    tensors = map_tensors(path)
    check_once(_state(path, checksums), lambda: verify(path, tensors, checksums))
    return tensors


def has_been_checked(path: Path, checksums: Mapping[str, str]) -> None:
    """Spare `map_checked` what the caller has just done."""
    check_once(_state(path, checksums), lambda: None)


def _state(path: Path, checksums: Mapping[str, str]) -> str:
    stat = path.stat()
    state = [str(path.absolute()), stat.st_ino, stat.st_size, stat.st_mtime_ns]
    return json.dumps([*state, dict(sorted(checksums.items()))])


def _marker(what: str) -> IO[str] | None:
    """A file that holds something once the check has been passed; None where there can be none."""
    if not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    folder = Path(context.get_temp_dir()) / context.get_session_name() / "raysae-checked"
    with suppress(OSError):  # of another user's Ray, or a full disk
        folder.mkdir(exist_ok=True)
        return (folder / hashlib.sha256(what.encode()).hexdigest()).open("a+", encoding="utf-8")
    return None
