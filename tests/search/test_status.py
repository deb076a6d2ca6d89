"""`raysae status`: the truth about a search that runs, was killed or is over, from its folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from raysae.errors import UserError
from raysae.journal import JOURNAL
from raysae.search.progress import Expected, Standing
from raysae.search.status import STATUS_FILE, StatusFile, read_status, show_status

ROOT = Path(__file__).resolve().parents[2]
END = Callable[..., dict[str, Any]]


@pytest.fixture
def end(make_spec) -> END:
    """An `end` record of the journal."""

    def make(number: int, score: float = 0.25, state: str = "finished", **changes: Any) -> Any:
        metrics = {"loss": 1.5, "l0": 4.0}
        rung = {"score": score, "status": "ok", "step": 24, "tokens": 1536, "metrics": metrics}
        return {
            "event": "end",
            "trial": number,
            "state": state,
            "spec": make_spec(number=number).to_dict(),
            "error": "",
            "started": 1000.0 + 10 * number,
            "ended": 1010.0 + 10 * number,
            "rung": rung if state != "failed" else {},
            "curve": [],
        } | changes

    return make


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def write_journal(run_dir: Path, *records: dict[str, Any]) -> None:
    text = "".join(json.dumps(record) + "\n" for record in records)
    (run_dir / JOURNAL).write_text(text, encoding="utf-8")


def running(make_spec, number: int, tokens: int) -> dict[str, Any]:
    rung = {"score": None, "status": None, "tokens": None}
    trial = {"number": number, "state": "running", "spec": make_spec(number=number).to_dict()}
    return trial | {"error": "", "rung": rung, "tokens": tokens, "started": 1000.0}


def told(run_dir: Path, **options: Any) -> str:
    out = StringIO()
    show_status(run_dir, Console(file=out, width=160), **options)
    return out.getvalue()


def standing(*trials: dict[str, Any], now: float = 1100.0, expected: int = 3) -> Standing:
    return Standing(list(trials), Expected(expected), now, tokens_per_second=500.0)


# --- While it runs --------------------------------------------------------------------------------


def test_a_running_search_shows_its_open_trials_beside_the_journals(run_dir, end, make_spec):
    write_journal(run_dir, end(0))
    file = StatusFile(run_dir, 1000.0, {"dashboard": "http://127.0.0.1:8265"})
    file.update(standing(running(make_spec, 1, 768)))
    folder = read_status(run_dir, now=1102.0)
    assert folder.state == "running"
    assert [(t["number"], t["state"]) for t in folder.view.standing.trials] == [
        (0, "finished"),
        (1, "running"),
    ]
    assert folder.view.elapsed == 102.0
    assert folder.view.standing.total == 3
    text = told(run_dir)
    assert "1 of 3 trials · 1 running" in text
    assert "http://127.0.0.1:8265" in text and "500 tokens/s" in text


def test_what_is_amiss_with_a_running_search_is_said(run_dir: Path, make_spec):
    file, trials = StatusFile(run_dir, 1000.0, {}), standing(running(make_spec, 0, 768))
    file.update(trials, (), "no worker for 90 s")
    assert read_status(run_dir).view.note == "running, no worker for 90 s"
    file.update(trials, (), last=True)
    assert "no worker" not in read_status(run_dir).view.note


def test_the_journal_wins_over_an_older_status_file(run_dir, end, make_spec):
    StatusFile(run_dir, 1000.0, {}).update(standing(running(make_spec, 0, 768)))
    write_journal(run_dir, end(0))
    (trial,) = read_status(run_dir).view.standing.trials
    assert trial["state"] == "finished"


def test_the_file_is_replaced_at_most_once_a_second_and_whole(run_dir, make_spec):
    path = run_dir / STATUS_FILE
    file = StatusFile(run_dir, 1000.0, {})
    write_journal(run_dir)
    file.update(standing(running(make_spec, 0, 64), now=1000.0))
    first = path.stat().st_ino
    file.update(standing(running(make_spec, 0, 128), now=1000.9))
    assert json.loads(path.read_text())["trials"][0]["tokens"] == 64
    with path.open() as reader:  # holds the old file while the new one takes its name
        file.update(standing(running(make_spec, 0, 192), now=1001.1))
        assert json.load(reader)["trials"][0]["tokens"] == 64
    assert path.stat().st_ino != first
    assert json.loads(path.read_text())["trials"][0]["tokens"] == 192
    assert sorted(p.name for p in run_dir.iterdir()) == [JOURNAL, STATUS_FILE]


def test_the_last_update_is_written_at_once(run_dir):
    file = StatusFile(run_dir, 1000.0, {})
    file.update(standing(now=1000.0))
    file.update(standing(now=1000.1), last=True)
    assert json.loads((run_dir / STATUS_FILE).read_text())["over"] is True


# --- Afterwards -----------------------------------------------------------------------------------


@pytest.fixture
def killed_search(run_dir, make_spec) -> Iterator[Path]:
    """A folder whose status file was written by a process that has been killed since."""
    code = f"""
        import sys, time
        from pathlib import Path
        from raysae.search.progress import Expected, Standing
        from raysae.search.status import StatusFile
        trials = [{running(make_spec, 1, 768)!r}]
        StatusFile(Path(sys.argv[1]), 1000.0, {{}}).update(Standing(trials, Expected(3), 1100.0))
        print("written", flush=True)
        time.sleep(600)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(run_dir)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None and process.stdout.readline() == "written\n"
    assert read_status_of(run_dir) == "running"
    process.kill()
    process.wait()
    yield run_dir


def read_status_of(run_dir: Path) -> str:
    (run_dir / JOURNAL).touch()
    return read_status(run_dir).state


def test_a_killed_search_is_not_running_and_keeps_what_had_ended(killed_search, end):
    write_journal(killed_search, end(0))
    folder = read_status(killed_search)
    assert folder.state == "stopped"
    assert [t["number"] for t in folder.view.standing.trials] == [0]
    assert "1 of 3 trials" in told(killed_search)


def test_a_search_that_is_over_says_what_stopped_trials_were_asked(run_dir, end):
    """Of an older version they were asked everything, and nothing is to be said."""
    stopped = [end(number, state="stopped") for number in (1, 2)]
    write_journal(run_dir, end(0), *stopped)
    assert "searched on alone" not in told(run_dir)
    for record, step in zip(stopped, (12, 6), strict=True):
        unasked = {"heldout_score": None, "saebench_score": None}
        record["rung"] |= unasked | {"step": step, "questions": "search half"}
    write_journal(run_dir, end(0), *stopped)
    words = "2 trials stopped at step 6 or 12: scored on the questions searched on alone"
    assert words in told(run_dir)


def test_another_process_with_the_same_number_is_not_the_search(run_dir):
    StatusFile(run_dir, 1000.0, {}).update(standing())
    status = json.loads((run_dir / STATUS_FILE).read_text())
    assert status["pid"] == os.getpid()
    status["process_started"] -= 60.0
    (run_dir / STATUS_FILE).write_text(json.dumps(status))
    assert read_status_of(run_dir) == "stopped"


@pytest.mark.parametrize(("silent", "state"), [(5.0, "running"), (300.0, "stopped")])
def test_a_search_on_another_machine_lives_as_long_as_it_writes(run_dir, silent: float, state: str):
    StatusFile(run_dir, 1000.0, {}).update(standing(now=1100.0))
    status = json.loads((run_dir / STATUS_FILE).read_text()) | {"host": "elsewhere"}
    (run_dir / STATUS_FILE).write_text(json.dumps(status))
    (run_dir / JOURNAL).touch()
    assert read_status(run_dir, now=1100.0 + silent).state == state


def test_a_finished_search_ends_with_its_verdicts_errors_and_times(run_dir, end):
    write_journal(
        run_dir,
        end(0, 0.25),
        end(1, 0.5),
        end(2, state="failed", error="loss is [red]nan"),
        end(3, 0.9, spec=end(3)["spec"] | {"stage": "confirmation", "run": "trial 1"}),
    )
    (run_dir / "confirmation.csv").write_text(
        "candidate,baseline,seeds,difference,low,high,wins,beats\n1,none,3,0.05,0.01,0.09,3,True\n"
    )
    facts = {"wall_seconds": 321.0, "busy_share": 0.78, "peak_gib": 2.9}
    (run_dir / "facts.json").write_text(json.dumps(facts))
    folder = read_status(run_dir)
    assert (folder.state, folder.view.elapsed) == ("finished", 321.0)
    lines = told(run_dir).splitlines()
    rows = [line.split()[0] for line in lines if line.split()[1:2] in (["finished"], ["failed"])]
    assert rows == ["1", "0", "2"]  # by score, without the confirmation
    assert "failed: trial 2: loss is [red]nan" in lines
    verdict = "Confirmation: trial 1 (none α=1 constant k=4) beats none: held-out difference "
    assert f"{verdict}+0.050 [+0.010, +0.090], 3 fresh seeds" in lines
    assert any(line.startswith("321 s in all, 78%") for line in lines)


@pytest.mark.parametrize(
    ("transferred", "caution"),
    [
        ("0.03,True,False", ""),
        ("0.03,False,False", "; caution: by the transferred score it is not shown to beat it"),
        (",,", ""),
    ],
)
def test_a_verdict_warns_where_the_transferred_score_does_not_agree(
    transferred: str, caution: str, run_dir, end
):
    write_journal(run_dir, end(0, 0.25), end(1, 0.5))
    (run_dir / "confirmation.csv").write_text(
        "candidate,baseline,seeds,difference,low,high,wins,beats,worse,transferred_difference,"
        "transferred_beats,transferred_worse\n"
        f"1,none,3,0.05,0.01,0.09,3,True,False,{transferred}\n"
    )
    facts = {"wall_seconds": 321.0, "busy_share": 0.78, "peak_gib": 2.9}
    (run_dir / "facts.json").write_text(json.dumps(facts))
    (line,) = (line for line in told(run_dir).splitlines() if line.startswith("Confirmation:"))
    assert line.endswith(f"3 fresh seeds{caution}")


def test_a_candidate_that_is_worse_is_called_that(run_dir, end):
    write_journal(run_dir, end(0, 0.25), end(1, 0.5))
    (run_dir / "confirmation.csv").write_text(
        "candidate,baseline,seeds,difference,low,high,wins,beats,worse\n"
        "1,none,3,-0.05,-0.09,-0.01,0,False,True\n"
    )
    facts = {"wall_seconds": 321.0, "busy_share": 0.78, "peak_gib": 2.9}
    (run_dir / "facts.json").write_text(json.dumps(facts))
    (line,) = (line for line in told(run_dir).splitlines() if line.startswith("Confirmation:"))
    assert ") is worse than none: held-out difference -0.050 [-0.090, -0.010]" in line


def test_a_summary_of_an_earlier_start_does_not_finish_a_later_one(run_dir, end):
    write_journal(run_dir, end(0))
    (run_dir / "facts.json").write_text("{}")
    os.utime(run_dir / "facts.json", (900.0, 900.0))
    file = StatusFile(run_dir, 1000.0, {})
    file.update(standing(now=1100.0), last=True)
    assert read_status(run_dir, now=1110.0).state == "running"  # its tables are being written
    assert read_status(run_dir, now=1200.0).state == "stopped"


def test_a_folder_from_before_status_files_takes_its_size_from_the_configuration(run_dir, end):
    write_journal(run_dir, end(0))
    (run_dir / "config.yaml").write_text("space: {}\nsearch: {num_samples: 24, sampler: tpe}\n")
    assert read_status(run_dir).view.standing.total == 24


def test_a_record_that_was_cut_off_is_left_out(run_dir, end):
    write_journal(run_dir, end(0))
    with (run_dir / JOURNAL).open("a") as file:
        file.write('{"event": "end", "tri')
    assert len(read_status(run_dir).view.standing.trials) == 1


# --- The command ----------------------------------------------------------------------------------


def test_what_is_no_run_folder_is_refused_with_those_that_are(run_dir):
    with pytest.raises(UserError, match=r"no such folder \(one has a journal.jsonl\)"):
        read_status(run_dir / "nowhere")
    with pytest.raises(UserError, match="no run folder"):
        read_status(run_dir)
    (run_dir / JOURNAL).touch()
    with pytest.raises(UserError, match="it has the run folders run"):
        read_status(run_dir.parent)


def test_the_command_needs_neither_ray_nor_torch(run_dir, end, tmp_path):
    write_journal(run_dir, end(0))
    trap = tmp_path / "trap"
    trap.mkdir()
    for heavy in ("ray", "torch", "pandas", "numpy", "sklearn", "optuna", "tensorboardX"):
        (trap / f"{heavy}.py").write_text(f"raise SystemExit('{heavy} was imported')\n")
    code = "import sys; sys.argv = ['raysae', *sys.argv[1:]]; from raysae.cli import commands; "
    done = subprocess.run(
        [sys.executable, "-c", code + "commands()", "status", str(run_dir)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(trap), "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "best  trial 0  0.250" in done.stdout


def test_watching_ends_with_the_search(run_dir, end, make_spec, monkeypatch):
    write_journal(run_dir, end(0, 0.25))
    StatusFile(run_dir, 1000.0, {}).update(standing(running(make_spec, 1, 768)))
    looks = iter(range(3))

    def sleep(_: float) -> None:
        if next(looks) == 2:
            write_journal(run_dir, end(0, 0.25), end(1, 0.5))
            facts = {"wall_seconds": 321.0, "busy_share": 0.78, "peak_gib": 2.9}
            (run_dir / "facts.json").write_text(json.dumps(facts))

    monkeypatch.setattr("raysae.search.status.time.sleep", sleep)
    out = StringIO()
    show_status(run_dir, Console(file=out, width=160, force_terminal=True), watch=True)
    assert next(looks, None) is None
    assert "1 of 3 trials" in out.getvalue()
    assert "321 s in all" in out.getvalue().splitlines()[-1]
