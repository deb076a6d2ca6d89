"""Files of a run folder that anybody may have written, cut short or copied badly.

What cannot be read is said in one message: which file, what is wrong with it, what to do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from raysae.errors import UserError, first_line
from raysae.journal import JOURNAL, read_journal

FIELDS = {
    "submit": ("trial", "spec"),
    "start": ("trial",),
    "rung": ("trial", "step"),
    "proceed": ("trial", "tokens"),
    "end": ("trial", "state", "spec", "error", "rung"),
}
"""By event of the journal: what every reader of it counts on."""
SPEC_FIELDS = ("stage", "rungs", "regularizer", "alpha", "alpha_schedule", "sae")
"""What describes a trial."""


def read_records(run_dir: Path) -> list[dict[str, Any]]:
    """The journal's records, [] where there is no journal; each has the fields of its event.

    Raises:
        UserError: it is no journal, or one of another version.
    """
    path = run_dir / JOURNAL
    records = journal_lines(path)
    for number, record in enumerate(records, 1):
        wrong = problem(record)
        if wrong:
            raise UserError(
                f"{path}: record {number} cannot be read by this version: {wrong}; was it "
                "written by another version of raysae? (raysae report shows what can be read)"
            )
    return records


def journal_lines(path: Path) -> list[Any]:
    """What the journal's lines say, whatever it is; [] where there is no journal.

    Raises:
        UserError: it is no text, or a line that is not the last is no JSON.
    """
    try:
        return read_journal(path)
    except ValueError as error:  # of a line in the middle, or of bytes that are not text
        raise UserError(
            f"{path}: cannot be read as a journal: {first_line(error)}; restore it from a mirror "
            "or a copy of the run folder, if there is one"
        ) from None


def read_object(path: Path, advice: str) -> dict[str, Any]:
    """The JSON object in a file; {} where there is no file.

    Args:
        path: of the file.
        advice: what to do where it is broken, for the message.

    Raises:
        UserError: it holds something else.
    """
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: broken, not JSON ({first_line(error)}); {advice}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: broken, not a JSON object; {advice}")
    return data


def require(data: dict[str, Any], names: tuple[str, ...], path: Path, advice: str) -> None:
    """Refuse a file's object that lacks one of `names`.

    Raises:
        UserError: which, and the advice.
    """
    missing = [name for name in names if name not in data]
    if missing:
        raise UserError(f"{path}: lacks {', '.join(map(repr, missing))}; {advice}")


def problem(record: Any) -> str:
    """Why it is no record of the journal; "" if it is one."""
    if not isinstance(record, dict):
        return f"an object is expected, not a {type(record).__name__}"
    event = record.get("event")
    if event not in FIELDS:
        return f"its event is {event!r}"
    missing = [name for name in FIELDS[event] if name not in record]
    if not missing and event in ("submit", "end"):
        spec = record["spec"]
        found = spec if isinstance(spec, dict) else {}
        missing = [f"spec.{name}" for name in SPEC_FIELDS if name not in found]
    return f"it has no {missing[0]!r}" if missing else ""
