"""One search through Ray, watched from outside while it runs, and what it leaves to look at."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import optuna
import pandas as pd
import pytest
from huggingface_hub import ModelCard
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from test_gauges import COUNTERS
from test_tensorboard import scalars

from raysae.pool.waits import WORKER_METRICS
from raysae.search.gauges import SEARCH_GAUGES
from raysae.search.status import STATUS_FILE, read_status

pytestmark = pytest.mark.search
ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 400
"""Seconds, after which the search hangs."""


@dataclass
class Seen:
    """What was seen of the search while it ran."""

    out: Path
    stdout: str = ""
    states: set[str] = field(default_factory=set)
    running_tokens: set[int] = field(default_factory=set)
    metrics: str = ""
    optuna_trials: set[int] = field(default_factory=set)
    curve_points: int = 0

    def look(self) -> None:
        if not (self.out / STATUS_FILE).exists():
            return
        folder = read_status(self.out)
        self.states.add(folder.state)
        self.running_tokens |= {t.get("tokens", 0) for t in folder.view.standing.running}
        if (self.out / "optuna.journal").exists():
            self.optuna_trials.add(len(study(self.out).trials))
        first = scalars(self.out / "tensorboard" / "0000").get("train/loss", [])
        self.curve_points = self.curve_points or len(first)
        text = scrape(self.out)
        if text.count("raysae_") > self.metrics.count("raysae_"):
            self.metrics = text


def study(out: Path) -> optuna.Study:
    storage = JournalStorage(JournalFileBackend(str(out / "optuna.journal")))
    return optuna.load_study(study_name="raysae", storage=storage)


def scrape(out: Path) -> str:
    """The metrics endpoint that the status file names."""
    (address,) = json.loads((out / STATUS_FILE).read_text())["metrics"]
    try:
        with urllib.request.urlopen(address, timeout=5) as page:
            return str(page.read().decode())
    except OSError:  # named before it answers, or after it is gone
        return ""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    out = tmp_path_factory.mktemp("watched") / "run"
    command = [sys.executable, str(ROOT / "run_search.py"), "--smoke", "--out", str(out)]
    command += ["--set", "loggers=[wandb]"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
    watched = Seen(out)
    with (out.parent / "stdout").open("w+") as stdout:
        process = subprocess.Popen(
            command, cwd=out.parent, env=environment, stdout=stdout, stderr=subprocess.STDOUT
        )
        end = time.monotonic() + DEADLINE
        try:
            while process.poll() is None:
                assert time.monotonic() < end, "the search hangs"
                watched.look()
                time.sleep(0.5)
        finally:
            process.kill()
            process.wait()
        stdout.seek(0)
        watched.stdout = stdout.read()
    assert process.returncode == 0, watched.stdout
    return watched


# --- While it ran ---------------------------------------------------------------------------------


def test_the_status_was_running_with_progress_between_rungs_and_is_finished(seen: Seen):
    assert "running" in seen.states and "stopped" not in seen.states
    between = {tokens for tokens in seen.running_tokens if 0 < tokens < 65_536}
    assert len(between) > 2
    assert read_status(seen.out).state == "finished"


def test_the_metrics_endpoint_had_every_metric(seen: Seen):
    for name in (*SEARCH_GAUGES, *WORKER_METRICS):
        line = f"ray_{name}{'_total' if name in COUNTERS else ''}{{"
        assert line in seen.metrics, name
    assert re.search(r'ray_raysae_trials\{.*run="run".*state="running".*\} [12]', seen.metrics)
    stored = re.search(r'ray_raysae_store_bytes\{.*tier="object_store".*\} (\S+)', seen.metrics)
    assert stored is not None and float(stored[1]) > 1e6


def test_the_study_could_be_loaded_while_it_ran_and_afterwards(seen: Seen):
    assert len(seen.optuna_trials) > 1
    trials = study(seen.out).trials
    assert [t.state for t in trials] == [optuna.trial.TrialState.COMPLETE] * 3
    scores = pd.read_parquet(seen.out / "trials.parquet").set_index("trial")["score"]
    assert {t.number: t.value for t in trials} == scores.to_dict()


def test_the_curve_could_be_read_before_its_trial_was_over(seen: Seen):
    assert 0 < seen.curve_points < 64


# --- Afterwards -----------------------------------------------------------------------------------


def test_the_event_files_hold_the_tables(seen: Seen):
    trials = pd.read_parquet(seen.out / "trials.parquet").set_index("trial")
    curves = pd.read_parquet(seen.out / "curves.parquet")
    for number, row in trials.iterrows():
        found = scalars(seen.out / "tensorboard" / f"{number:04d}")
        curve = curves[curves["trial"] == number]
        wanted = list(zip(curve["step"], curve["loss"], strict=True))
        assert found["train/loss"] == [(step, pytest.approx(loss)) for step, loss in wanted]
        assert found["score/search"] == [(512, pytest.approx(row["score"]))]
        assert found["score/heldout"] == [(512, pytest.approx(row["heldout_score"]))]


def test_weights_and_biases_has_a_run_a_trial_with_its_score(seen: Seen):
    runs = list((seen.out / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(runs) == 3
    assert all(b"heldout_score" in path.read_bytes() for path in runs)


def test_the_best_has_a_card_with_its_scores(seen: Seen):
    card = ModelCard.load(seen.out / "best" / "README.md")
    trials = pd.read_parquet(seen.out / "trials.parquet")
    best = trials.sort_values("score", ascending=False, kind="stable").iloc[0]
    results = {r.dataset_split: r.metric_value for r in card.data.eval_results}
    assert results["search"] == pytest.approx(best["score"], abs=1e-4)
    assert results["heldout"] == pytest.approx(best["heldout_score"], abs=1e-4)


def test_without_a_terminal_every_trial_was_a_line(seen: Seen):
    lines = re.findall(r"^\[ *\d+ s\] trial +(\d+) finished", seen.stdout, re.MULTILINE)
    assert sorted(lines) == ["0", "1", "2"]
