"""Runs that are unfinished, broken, foreign, old or without a result."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from synthetic_runs import write_search

from raysae import cli
from raysae.errors import UserError
from raysae.journal import JOURNAL
from raysae.report.build import REPORT_FILE, build_report
from raysae.search import conclude

Record = dict[str, Any]


def built(folder: Path) -> str:
    """The report's words; it must come without an undefined figure."""
    page = build_report(folder).path.read_text(encoding="utf-8")
    words = re.sub(r"<(script|style).*?</\1>|<[^>]*>", " ", page, flags=re.S)
    assert not re.search(r"\bnan\b|NaN", words.replace("loss is nan", ""))
    return words


def rewrite(folder: Path, change: Callable[[list[Record]], list[Record]]) -> None:
    path = folder / JOURNAL
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [json.dumps(record) + "\n" for record in change(records)]
    path.write_text("".join(lines), encoding="utf-8")


def test_an_unfinished_run_is_reported_as_far_as_it_goes(copied):
    folder = copied()
    (folder / "facts.json").unlink()
    rewrite(folder, lambda records: [r for r in records if r["event"] == "rung" or r["trial"] < 9])
    page = built(folder)
    assert "has not come to its end" in page
    assert "had a score but had not ended" in page
    assert "9: " in page


def test_a_half_written_folder_says_what_it_lacks(copied):
    folder = copied()
    path = folder / JOURNAL
    path.write_text(path.read_text(encoding="utf-8")[:-40], encoding="utf-8")  # a crash
    (folder / "about.json").write_text('{"versions": {', encoding="utf-8")
    (folder / "config.yaml").unlink()
    (folder / "optuna.journal").write_text("{not json\n", encoding="utf-8")
    page = built(folder)
    assert "about.json is broken" in page
    assert "config.yaml is missing" in page
    assert "optuna.journal cannot be read" in page
    assert "reproduce.yaml" not in page
    assert "Leaderboard" in page


def test_a_run_of_an_older_version_is_reported_without_what_it_lacks(copied):
    def older(records: list[Record]) -> list[Record]:
        for record in records:
            record.pop("started", None)
            rung = record["rung"] if record["event"] == "end" else record
            for name in ("dense_features", "seeds", "typical_seed"):  # one SAE a trial
                rung.pop(name, None)
            if "spec" in record:
                del record["spec"]["seeds"]
            for row in rung.get("conditioning", []):
                for name in list(row):
                    if "_at_" in name or name in ("forget_retain_squared_cosine",):
                        del row[name]
        return records

    folder = copied()
    rewrite(folder, older)
    page = built(folder)
    assert "is not in this run's journal" in page.replace("&#39;", "'")


def test_records_that_cannot_be_read_are_counted(copied):
    def other(records: list[Record]) -> list[Record]:
        ends = [r for r in records if r["event"] == "end"]
        del ends[3]["spec"]["sae"]
        return records

    folder = copied()
    rewrite(folder, other)
    assert "1 record of the journal cannot be read by this version" in built(folder)


def test_a_search_of_failed_trials(tmp_path: Path):
    folder = write_search(tmp_path / "failed", 1, confirm=False)

    def fail(records: list[Record]) -> list[Record]:
        end = records[-1] | {"state": "failed", "error": "ValueError: no", "rung": {}, "curve": []}
        return [end]

    rewrite(folder, fail)
    page = built(folder)
    assert "Every trial failed (1)" in page
    assert "ValueError: no" in page


def test_a_single_trial(tmp_path: Path):
    page = built(write_search(tmp_path / "single", 1, confirm=False))
    assert "The best of 1 trials is none" in page
    assert "cannot be said from this run" in page


def test_constant_scores(tmp_path: Path):
    folder = write_search(tmp_path / "constant", 14, constant=True, failing=0, confirm=False)

    def same(records: list[Record]) -> list[Record]:
        for record in records:
            rung = record["rung"] if record["event"] == "end" else record
            rung |= dict.fromkeys(("score", "heldout_score", "saebench_score"), 0.25)
        return records

    rewrite(folder, same)
    page = built(folder)
    assert "all scores are the same" in page


def test_no_trial_has_ended(copied):
    folder = copied()
    (folder / JOURNAL).write_text("")
    assert "No trial has ended" in built(folder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: None, "no such folder"),
        (lambda folder: folder.mkdir(), "not a run folder: it has no journal.jsonl"),
        (lambda folder: _write(folder, b"\xff\xfe\x00junk"), "cannot be read as a journal"),
        (lambda folder: _write(folder, b'{"a": 1}\nnot json\n{"b": 2}\n'), "not a JSON record"),
        (lambda folder: _write(folder, b'{"event": "end", "epoch": 3}\n'), "another version"),
        (lambda folder: _write(folder, b"[1, 2]\n"), "another version"),
    ],
    ids=["missing", "empty", "binary", "broken", "foreign", "list"],
)
def test_what_is_no_run_folder_gives_one_message(
    make: Callable[[Path], None], message: str, tmp_path: Path, monkeypatch, capsys
):
    folder = tmp_path / "folder"
    make(folder)
    with pytest.raises(UserError, match=message):
        build_report(folder)
    monkeypatch.setattr("sys.argv", ["raysae", "report", str(folder)])
    with pytest.raises(SystemExit) as ended:
        cli.commands()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not (folder / REPORT_FILE).exists()


def _write(folder: Path, journal: bytes) -> None:
    folder.mkdir()
    (folder / JOURNAL).write_bytes(journal)


def test_a_failed_report_does_not_lose_the_search(tmp_path: Path, monkeypatch):
    def broken(_: Path) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr("raysae.report.build.build_report", broken)
    note = conclude._report(tmp_path, {"wall_seconds": 1.0})
    assert note.startswith("The report failed: RuntimeError: no ink")
    assert "RuntimeError: no ink" in (tmp_path / "report_error.log").read_text()
    assert json.loads((tmp_path / "facts.json").read_text()) == {"wall_seconds": 1.0}
