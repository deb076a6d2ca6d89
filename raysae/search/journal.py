"""Reading the journal: the append-only record of what happened, one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

JOURNAL = "journal.jsonl"


def read_journal(path: Path) -> list[dict[str, Any]]:
    """All complete records; a last line cut off by a crash is left out."""
    if not path.exists():
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
