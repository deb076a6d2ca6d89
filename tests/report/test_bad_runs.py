"""Runs that are unfinished, broken, foreign, old or without a result."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from synthetic_runs import write_search, write_study

from raysae import cli
from raysae.config import find_space
from raysae.journal import JOURNAL
from raysae.report.build import REPORT_FILE, build_report
from raysae.search import conclude

Record = dict[str, Any]
COUNTS = ("forget_correct", "forget_total", "retain_correct", "retain_total")


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


def test_the_report_writes_the_tables_of_a_run_that_was_killed_before_its_end(copied):
    folder = copied()
    names = ("trials", "seeds", "curves", "conditioning")
    whole = {name: pd.read_parquet(folder / f"{name}.parquet") for name in names}
    for name in names:
        (folder / f"{name}.parquet").unlink()
        (folder / f"{name}.csv").unlink()
    for name in ("facts.json", "confirmation.csv"):
        (folder / name).unlink(missing_ok=True)
    built(folder)
    for name, table in whole.items():
        written = pd.read_parquet(folder / f"{name}.parquet")
        pd.testing.assert_frame_equal(written, table, check_dtype=False)
        assert len(pd.read_csv(folder / f"{name}.csv")) == len(table)
    assert (pd.read_csv(folder / "confirmation.csv")["seeds"] > 0).all()


def test_tables_older_than_the_journal_are_written_anew(copied):
    folder = copied()
    rewrite(folder, lambda records: [r for r in records if r["trial"] < 5])
    built(folder)
    assert set(pd.read_parquet(folder / "trials.parquet")["trial"]) == set(range(5))


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
            for name in ("transferred_score", "transferred_score_std"):
                rung.pop(name, None)
            found = rung["halves"]["transferred"] if rung else None
            if found:  # the counts alone, where an intervention was chosen
                counts = {name: found[name] for name in COUNTS if name in found}
                rung["halves"]["transferred"] = counts or None
            if rung.pop("questions", "") == "search half":  # all were asked at every rung
                rung |= dict.fromkeys(("heldout_score", "saebench_score"), 0.9 * rung["score"])
                rung["halves"]["heldout"] = rung["halves"]["search"]
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
    assert "searched on alone" not in page
    assert "ransferred" not in page
    trials = pd.read_csv(folder / "trials.csv")
    assert (trials["state"] == "stopped").any()
    scored = trials[trials["state"] != "failed"]
    assert scored["heldout_score"].notna().all() and (scored["questions"] == "all").all()


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
            for found in (rung, *rung.get("seeds", [])):
                found |= dict.fromkeys(("score", "heldout_score", "saebench_score"), 0.25)
        return records

    rewrite(folder, same)
    page = built(folder)
    assert "all scores are the same" in page


def test_a_search_of_stopped_trials(tmp_path: Path):
    """None has a held-out score, and the report says what it has instead."""
    folder = write_search(tmp_path / "stopped", 30, failing=0, confirm=False)
    numbers: set[int] = set()

    def stopped(records: list[Record]) -> list[Record]:
        ends = [r for r in records if r["event"] == "end" and r["state"] == "stopped"]
        numbers.update(r["trial"] for r in ends)
        return [r for r in records if r["trial"] in numbers]

    rewrite(folder, stopped)
    page = built(folder)
    assert len(numbers) >= 12
    assert "No trial was trained to its end" in page
    assert "by the score on the questions that the search sees" in page
    assert "Score on the questions searched on: highest mean" in page
    assert "The questions that the search sees, of the best trials" in page
    trials = pd.read_csv(folder / "trials.csv")
    assert len(trials) == len(numbers) and trials["heldout_score"].isna().all()


def test_a_study_of_which_some_seeds_were_stopped(tmp_path: Path):
    folder = write_study(tmp_path / "study", 3, 2)

    def stop(records: list[Record]) -> list[Record]:
        for record in records:
            if record["trial"] in (1, 4):  # both seeds of a run
                rung = record["rung"] if record["event"] == "end" else record
                rung |= {"heldout_score": None, "saebench_score": None, "questions": "search half"}
                rung["halves"] |= {"heldout": None, "transferred": None}
                if record["event"] == "end":
                    record["state"] = "stopped"
        return records

    rewrite(folder, stop)
    page = built(folder)
    assert "Score of those that the search sees" in page
    runs = pd.read_csv(folder / "runs.csv")
    assert runs["seeds"].tolist() == [2, 0, 2]


def test_no_trial_has_ended(copied):
    folder = copied()
    (folder / JOURNAL).write_text("")
    assert "No trial has ended" in built(folder)


def _nothing(folder: Path) -> None:
    pass


def _journal(content: bytes) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / JOURNAL).write_bytes(content)

    return make


FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (_nothing, "no such folder"),
    "empty": (Path.mkdir, "no run folder|not a run folder: it has no journal.jsonl"),
    "binary": (_journal(b"\xff\xfe\x00junk"), "cannot be read as a journal"),
    "broken": (_journal(b'{"a": 1}\nnot json\n{"b": 2}\n'), "not a JSON record"),
    "foreign": (_journal(b'{"event": "end", "epoch": 3}\n'), "another version"),
    "foreign start": (_journal(b'{"event": "start"}\n'), "another version"),
    "list": (_journal(b"[1, 2]\n"), "another version"),
    "spec": (_journal(b'{"event": "submit", "trial": 0, "time": 1, "session": "", "spec": []}\n'),
             "another version"),
}  # fmt: skip
"""Run folders that are none, and what is said of them."""


def refused(monkeypatch, capsys, *command: str) -> str:
    """What a command says that ends with exit code 2 and one message."""
    monkeypatch.setattr("sys.argv", ["raysae", *command])
    with pytest.raises(SystemExit) as ended:
        cli.commands()
    assert ended.value.code == 2
    said: str = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


@pytest.mark.parametrize("which", FOLDERS)
@pytest.mark.parametrize("command", ["report", "status"])
def test_what_is_no_run_folder_gives_one_message(
    command: str, which: str, tmp_path: Path, monkeypatch, capsys
):
    folder = tmp_path / "folder"
    make, message = FOLDERS[which]
    make(folder)
    assert re.search(message, refused(monkeypatch, capsys, command, str(folder)))
    assert not (folder / REPORT_FILE).exists()


@pytest.mark.parametrize("which", FOLDERS)
def test_what_is_no_run_folder_is_neither_gone_on_with_nor_pushed(
    which: str, tmp_path: Path, monkeypatch, capsys
):
    """Beside a broken journal everything else is whole, so that nothing else is refused."""
    folder = tmp_path / "folder"
    make, message = FOLDERS[which]
    make(folder)
    has_journal = (folder / JOURNAL).is_file()
    if has_journal:
        about = {"sessions": [], "started": "", "world_fingerprint": "", "versions": {}}
        (folder / "about.json").write_text(json.dumps(about))
        shutil.copy(find_space("orth.yaml"), folder / "config.yaml")
        (folder / "best").mkdir()
        (folder / "best" / "cfg.json").write_text('{"d_in": 4, "d_sae": 8}')
        spec = {"number": 0, "run": ""}
        text = json.dumps({"spec": spec, "training_steps": 1})
        (folder / "best" / "trial.json").write_text(text)
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    message = message if has_journal else "no search has begun there|no best SAE there"
    for command in (["resume", str(folder)], ["push", str(folder), "me/sae"]):
        assert re.search(message, refused(monkeypatch, capsys, *command))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("status.json", b'{"time": 1.0, "trials": [', "status.json: broken, not JSON"),
        ("status.json", b"[]", "status.json: broken, not a JSON object"),
        ("status.json", b'{"time": 1.0}', "status.json: lacks 'over'"),
        ("facts.json", b'{"wall_seconds": 1', "facts.json: broken, not JSON"),
        ("facts.json", b'{"wall_seconds": 1}', "facts.json: lacks 'busy_share'"),
        ("facts.json", b"\xff", "facts.json: broken, not JSON"),
        ("confirmation.csv", b"candidate,baseline\n1,none\n", "confirmation.csv: broken"),
    ],
)
def test_status_names_the_file_that_is_broken_and_what_to_do(
    name: str, content: bytes, message: str, copied, monkeypatch, capsys
):
    folder = copied()
    (folder / name).write_bytes(content)
    said = refused(monkeypatch, capsys, "status", str(folder))
    assert message in said and "remove it" in said


def test_status_without_a_status_file_refuses_a_broken_configuration(copied, monkeypatch, capsys):
    folder = copied()
    (folder / "config.yaml").write_text("space: {\n")
    said = refused(monkeypatch, capsys, "status", str(folder))
    assert "config.yaml: broken" in said


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("about.json", '{"sessions": [', "about.json: broken, not JSON"),
        ("about.json", "{}", "about.json: lacks 'sessions'"),
        ("config.yaml", "space: {", "config.yaml"),
        ("mirror.json", '{"addr', "mirror.json: broken, not JSON"),
        ("mirror.json", "{}", "mirror.json: lacks 'address'"),
    ],
)
def test_resume_names_the_file_that_is_broken(
    name: str, content: str, message: str, copied, monkeypatch, capsys
):
    folder = copied()
    (folder / name).write_text(content)
    assert message in refused(monkeypatch, capsys, "resume", str(folder))


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("best/trial.json", "trial.json: lacks 'spec', 'training_steps'; it is missing"),
        ("about.json", "about.json: lacks 'versions'; it is missing"),
        ("config.yaml", "config.yaml: cannot be read"),
        ("journal.jsonl", "which has no score in the journal"),
    ],
)
def test_push_names_what_the_best_sae_lacks(
    missing: str, message: str, copied, monkeypatch, capsys
):
    folder = copied()
    records = [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()]
    spec = next(record["spec"] for record in records if record["event"] == "end")
    (folder / "best").mkdir(exist_ok=True)
    (folder / "best" / "cfg.json").write_text('{"d_in": 4, "d_sae": 8}')
    text = json.dumps({"spec": spec, "training_steps": 1})
    (folder / "best" / "trial.json").write_text(text)
    (folder / missing).unlink()
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    assert message in refused(monkeypatch, capsys, "push", str(folder), "me/sae")


def test_a_failed_report_does_not_lose_the_search(tmp_path: Path, monkeypatch):
    def broken(_: Path) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr("raysae.report.build.build_report", broken)
    note = conclude._report(tmp_path, {"wall_seconds": 1.0})
    assert note.startswith("The report failed: RuntimeError: no ink")
    assert "RuntimeError: no ink" in (tmp_path / "report_error.log").read_text()
    assert json.loads((tmp_path / "facts.json").read_text()) == {"wall_seconds": 1.0}
