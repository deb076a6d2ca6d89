"""One search through Ray, watched from outside while it runs, and what it leaves to look at."""

from __future__ import annotations

import re

import optuna
import pandas as pd
import pytest
from huggingface_hub import ModelCard
from observed import Seen, beyond_this_machine, study
from test_gauges import COUNTERS
from test_tensorboard import scalars

from raysae.pool.waits import WORKER_METRICS
from raysae.search.gauges import SEARCH_GAUGES
from raysae.search.status import read_status

pytestmark = pytest.mark.search


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
    table = pd.read_parquet(seen.out / "trials.parquet")
    scores = table[table["stage"] == "search"].set_index("trial")["score"]
    assert {t.number: t.value for t in trials} == scores.to_dict()


def test_the_curve_could_be_read_before_its_trial_was_over(seen: Seen):
    assert 0 < seen.curve_points < 64


def test_it_listened_for_this_machine_alone(seen: Seen):
    processes = " ".join(seen.listening)
    for name in ("run_search.py", "gcs_server", "raylet", "dashboard", "ray::"):
        assert name in processes
    assert beyond_this_machine(seen) == {}


def test_the_dashboard_refuses_who_has_no_token(seen: Seen):
    assert seen.unasked == 401


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


@pytest.mark.slow
def test_weights_and_biases_has_a_run_a_trial_with_its_score(seen: Seen):
    runs = list((seen.out / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(runs) == len(pd.read_parquet(seen.out / "trials.parquet")) > 3
    assert all(b"heldout_score" in path.read_bytes() for path in runs)


def test_the_best_has_a_card_with_its_scores(seen: Seen):
    card = ModelCard.load(seen.out / "best" / "README.md")
    trials = pd.read_parquet(seen.out / "trials.parquet")
    trials = trials[trials["stage"] == "search"]
    best = trials.sort_values("score", ascending=False, kind="stable").iloc[0]
    seeds = pd.read_parquet(seen.out / "seeds.parquet")
    seeds = seeds[seeds["trial"] == best["trial"]].sort_values("score", kind="stable")
    typical = seeds.iloc[(len(seeds) - 1) // 2]  # the one with the median score is the one in best/
    results = {r.dataset_split: r.metric_value for r in card.data.eval_results}
    assert results["search"] == pytest.approx(typical["score"], abs=1e-4)
    assert results["heldout"] == pytest.approx(typical["heldout_score"], abs=1e-4)


def test_without_a_terminal_every_trial_was_a_line(seen: Seen):
    lines = re.findall(r"^\[ *\d+ s\] trial +(\d+) finished", seen.stdout, re.MULTILINE)
    trials = pd.read_parquet(seen.out / "trials.parquet")["trial"]
    assert sorted(map(int, lines)) == sorted(trials)
