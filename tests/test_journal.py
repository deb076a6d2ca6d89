"""The journal survives a crash in the middle of a line, and is not silent about damage."""

import json
from pathlib import Path

import pytest

from raysae.journal import ended_trials, read_journal

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
