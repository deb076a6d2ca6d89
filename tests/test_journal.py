"""The journal survives a crash in the middle of a line, and is not silent about damage."""

import json
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from raysae.journal import append, ended_trials, read_journal

RECORDS = [
    {"event": "rung", "trial": 1, "score": 0.5},
    {"event": "end", "trial": 1, "state": "finished"},
    {"event": "end", "trial": 0, "state": "failed", "error": "«ä»\nnext line"},
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    journal = tmp_path / "journal.jsonl"
    journal.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return journal


def test_records_come_back_in_order(path: Path):
    assert read_journal(path) == RECORDS


def test_a_journal_that_was_never_begun_is_empty(tmp_path: Path):
    assert read_journal(tmp_path / "none.jsonl") == []


def test_an_empty_journal_is_empty(tmp_path: Path):
    (tmp_path / "empty.jsonl").touch()
    assert read_journal(tmp_path / "empty.jsonl") == []


@pytest.mark.parametrize("cut", [1, 2, 10, 40])
def test_a_last_line_cut_off_by_a_crash_is_left_out(path: Path, cut: int):
    text = path.read_text()
    path.write_text(text[:-cut])
    wanted = RECORDS if cut == 1 else RECORDS[:-1]  # the line end alone is not missed
    assert read_journal(path) == wanted


def test_damage_before_the_end_is_an_error_that_names_the_line(path: Path):
    lines = path.read_text().split("\n")
    path.write_text("\n".join([lines[0], lines[1][:10], lines[2], ""]))
    with pytest.raises(ValueError, match=r"journal\.jsonl:2: not a JSON record"):
        read_journal(path)


def test_ended_trials_are_ordered_by_number():
    assert [end["trial"] for end in ended_trials(RECORDS)] == [0, 1]


def test_the_first_end_of_a_trial_counts():
    later = {"event": "end", "trial": 1, "state": "failed"}
    assert [end["state"] for end in ended_trials([*RECORDS, later])] == ["failed", "finished"]


def test_trials_without_an_end_are_not_among_the_ended():
    assert ended_trials([{"event": "rung", "trial": 4}]) == []


# --- Writing --------------------------------------------------------------------------------------


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """The kernel writes what fits and refuses the rest, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("length", [1500, 7000, 30000])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.6, 0.9])
def test_a_record_for_which_there_is_no_room_leaves_the_file_as_it_was(
    length: int, part: float, path: Path
):
    """Shorter and longer than a buffer, of which a part would still be written later."""
    append(path, {"event": "submit", "trial": 2, "spec": "a" * 9000})
    before = path.read_bytes()
    with no_file_beyond(len(before) + int(length * part)), pytest.raises(OSError, match="large"):
        append(path, {"event": "end", "trial": 2, "state": "b" * length})
    assert path.read_bytes() == before
    append(path, {"event": "end", "trial": 2})
    assert read_journal(path)[-2:] == [
        json.loads(before.split(b"\n")[-2]),
        {"event": "end", "trial": 2},
    ]


def test_a_record_that_the_system_takes_in_pieces_is_whole(
    path: Path, monkeypatch: pytest.MonkeyPatch
):
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:7]))
    append(path, {"event": "end", "trial": 3, "state": "finished"})
    assert read_journal(path) == [*RECORDS, {"event": "end", "trial": 3, "state": "finished"}]


def test_the_name_of_a_new_journal_is_on_the_disk_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Else a machine that loses its power has the records and no file that they are in."""
    synced: list[bool] = []
    fsync = os.fsync

    def spy(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(stat.S_ISDIR(os.fstat(descriptor).st_mode))

    monkeypatch.setattr(os, "fsync", spy)
    for record in RECORDS:
        append(tmp_path / "new.jsonl", record)
    assert synced == [False, True, False, False]
    assert read_journal(tmp_path / "new.jsonl") == RECORDS
