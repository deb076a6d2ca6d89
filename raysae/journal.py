"""The journal: the append-only record of what happened, one JSON object a line.

Events of a trial: `submit` (a client asked for it), `start` (a worker took it), `rung` (it was
scored), `proceed` (it may train on), `end`. A record is on the disk before anyone hears of it. The
broker is its only writer; whoever starts after a crash learns from it what there was.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from raysae.fsync import sync

JOURNAL = "journal.jsonl"


def append(path: Path, record: dict[str, Any]) -> None:
    """Write one record and wait until it is on the disk; a new file's name too.

    Raises OSError where that is not possible; what could be written of it then is cut off again.
    """
    line = (json.dumps(record) + "\n").encode()
    new = not path.exists()
    # Without a buffer, which would be written out once more when the file is closed.
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        before = os.fstat(descriptor)
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        except OSError:
            if stat.S_ISREG(before.st_mode):
                os.ftruncate(descriptor, before.st_size)
            raise
    finally:
        os.close(descriptor)
    if new:
        sync(path.parent)


def cut_partial_line(path: Path) -> None:
    """Cut off the end of a file that a crash kept from becoming a line.

    Only for who alone writes to it: another's line may just be on its way.
    """
    if not path.is_file():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)


def read_journal(path: Path) -> list[dict[str, Any]]:
    """All complete records; a last line cut off by a crash is left out."""
    if not path.is_file():
        return []
    records = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines):
        if not line:
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines) - 1:
                raise ValueError(f"{path}:{number + 1}: not a JSON record") from None
    return records


def ended_trials(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The `end` record of every trial that has one, by trial number; the first one counts."""
    ends: dict[int, dict[str, Any]] = {}
    for record in records:
        if record["event"] == "end":
            ends.setdefault(record["trial"], record)
    return [ends[number] for number in sorted(ends)]


class JournalTail:
    """New records of a journal that somebody else appends to."""

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, 0

    def new(self) -> list[dict[str, Any]]:
        """Records that were completed since the last call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._read)
            complete, newline, _ = file.read().rpartition(b"\n")
        self._read += len(complete) + len(newline)
        return [json.loads(line) for line in complete.split(b"\n") if line]
