"""Journal records become tables with the documented columns, and come back from disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from raysae.analysis.conditioning import COLUMNS, conditioning_table
from raysae.analysis.seeds import over_seeds
from raysae.analysis.tables import (
    CONDITIONING,
    CURVE_COLUMNS,
    DIVERGED_ERROR,
    TRIAL_COLUMNS,
    best_first,
    conditioning_rows,
    curves_table,
    seeds_table,
    trials_table,
    write_tables,
)
from raysae.journal import ended_trials
from raysae.training.run import TrainingDivergedError
from raysae.training.spec import TrialSpec, config_hash
from raysae.unlearning import Halves
from raysae.unlearning.halves import Transfer, TransferStatus

Record = dict[str, Any]


def metrics(step: int) -> dict[str, float]:
    return {
        "loss": 5.0 / step,
        "l2_loss": 4.0 / step,
        "sparsity_loss": 0.0,
        "auxiliary_loss": 0.5 / step,
        "penalty": 0.25 / step,
        "alpha": 0.123,
        "l0": 4.0,
        "explained_variance": 1 - 1 / step,
        "dead_features": 3.0,
        "lr": 0.001,
    }


@pytest.fixture
def rung_record(fake_result: Callable[..., Any]) -> Callable[..., Record]:
    def make(trial: int, step: int, score: float = 0.25, *, last: bool = False) -> Record:
        rng = np.random.default_rng(trial)
        table = conditioning_table(
            rng.standard_normal((12, 6)),
            np.linspace(0, 1, 12),
            np.linspace(1, 0, 12),
            np.arange(12) % 2,
            trial=trial,
            step=step,
            baseline_draws=2,
        )
        search, heldout = fake_result(score), fake_result(0.2)
        (chosen,) = heldout.interventions
        transferred = Transfer(0.2, TransferStatus.ok, "made up too", chosen)
        return {
            "step": step,
            "tokens": 64 * step,
            "last": last,
            "objective": score,
            "score": score,
            "status": "ok",
            "cause": "made up",
            "heldout_score": 0.2,
            "transferred_score": 0.2,
            "saebench_score": 0.225,
            "halves": Halves(search, heldout, transferred).to_dict(),
            "result": fake_result(0.225).to_dict(),
            "metrics": metrics(step),
            "conditioning": json.loads(table.to_json(orient="records")),
            "dense_features": 5,
            "train_seconds": 2.0,
            "score_seconds": 0.5,
        }

    return make


def end_record(spec: TrialSpec, state: str, rung: Record, steps: int, error: str = "") -> Record:
    return {
        "event": "end",
        "trial": spec.number,
        "state": state,
        "spec": spec.to_dict(),
        "error": error,
        "attempts": 1,
        "submitted": 0.0,
        "started": 10.0,
        "ended": 46.0,
        "rung": rung,
        "curve": [{"step": s, "tokens": 64 * s, **metrics(s)} for s in range(1, steps + 1)],
    }


@pytest.fixture
def records(make_spec, rung_record) -> list[Record]:
    """Four trials: finished after two rungs, stopped at the first, raised, and cancelled."""
    baseline = make_spec(number=0, rungs=(512, 1536))
    grouped = make_spec(
        "standard",
        "grouped",
        {"group_update_period": 7, "n_groups": 3},
        number=1,
        schedule="cosine",
        alpha=0.3,
        rungs=(512, 1536),
    )
    diverged = make_spec(number=2, regularizer="fixed_orthogonal", alpha=30.0, seed=9)
    cancelled = make_spec(number=3)
    rungs = [
        rung_record(0, 8, 0.1),
        rung_record(1, 8, 0.5),
        rung_record(0, 24, 0.25, last=True),
    ]
    events = [
        {"event": "rung", "trial": trial, "time": 0.0, **rung}
        for trial, rung in zip((0, 1, 0), rungs, strict=True)
    ]
    return [
        *events,
        end_record(cancelled, "failed", {}, 0, "cancelled before its first rung"),
        end_record(grouped, "stopped", rungs[1], 8),
        end_record(diverged, "failed", {}, 3, "TrainingDivergedError: loss is nan"),
        end_record(baseline, "finished", rungs[2], 24),
    ]


@pytest.fixture
def trials(records: list[Record]) -> pd.DataFrame:
    return trials_table(ended_trials(records))


def test_every_trial_is_a_row_with_the_documented_columns(trials: pd.DataFrame):
    assert list(trials["trial"]) == [0, 1, 2, 3]
    assert list(trials.columns[: len(TRIAL_COLUMNS)]) == list(TRIAL_COLUMNS)


def test_a_methods_own_parameters_have_columns_of_their_own(trials: pd.DataFrame):
    extra = list(trials.columns[len(TRIAL_COLUMNS) :])
    assert [name for name in extra if not name.startswith("training.")] == [
        "alpha_schedule.end_factor",
        "regularizer.ema",
        "regularizer.n_groups",
        "regularizer.scope",
    ]
    assert trials.loc[1, "regularizer.n_groups"] == 3
    assert trials["regularizer.n_groups"].isna().tolist() == [True, False, True, True]


def test_the_configuration_of_a_trial_is_in_its_row(trials: pd.DataFrame):
    row = trials.loc[1]
    expected = {
        "regularizer": "grouped",
        "group_update_period": 7,
        "alpha": 0.3,
        "alpha_schedule": "cosine",
        "architecture": "standard",
        "d_sae": 32,
        "l1_coefficient": 0.5,
        "seed": 3,
        "attempts": 1,
    }
    assert {name: row[name] for name in expected} == expected
    assert np.isnan(row["k"])
    assert np.isnan(trials.loc[0, "group_update_period"])


def test_the_result_of_the_last_rung_reached_is_in_its_row(trials: pd.DataFrame):
    finished = trials.loc[0]
    expected = {
        "state": "finished",
        "stage": "search",
        "run": "",
        "score": 0.25,
        "heldout_score": 0.2,
        "transferred_score": 0.2,
        "saebench_score": 0.225,
        "frontier": 0.25,  # at no cost: the same loss at every retain accuracy
        "status": "ok",
        "training_steps": 24,
        "tokens": 1536,
        "forget_accuracy": 0.75,
        "retain_accuracy": 1.0,
        "forget_correct": 75,
        "forget_total": 100,
        "retain_correct": 40,
        "retain_total": 40,
        "heldout_forget_accuracy": 0.8,
        "heldout_retain_accuracy": 1.0,
        "transferred_status": "ok",
        "transferred_cause": "made up too",
        "transferred_forget_correct": 80,
        "transferred_forget_total": 100,
        "transferred_retain_correct": 40,
        "transferred_retain_total": 40,
        "best_retain_threshold": 0.01,
        "best_n_features": 2,
        "best_multiplier": 100,
        "eligible_features_0.001": 1,
        "eligible_features_0.01": 2,
        "loss": 5 / 24,
        "explained_variance": 1 - 1 / 24,
        "l0": 4.0,
        "train_seconds": 2.0,
        "score_seconds": 0.5,
        "tokens_per_second": 768.0,
        "error": "",
    }
    assert {name: finished[name] for name in expected} == expected
    assert (trials.loc[1, "state"], trials.loc[1, "training_steps"]) == ("stopped", 8)


def test_conditioning_of_the_whole_decoder_is_in_the_row(trials: pd.DataFrame):
    expected = conditioning_table(
        np.random.default_rng(0).standard_normal((12, 6)),
        np.linspace(0, 1, 12),
        np.linspace(1, 0, 12),
        trial=0,
        step=24,
        baseline_draws=2,
    ).set_index("group")
    for name in set(CONDITIONING) - {"adjusted_rand_index"}:
        assert trials.loc[0, name] == pytest.approx(expected.loc["all", name], rel=1e-6)


ABOUT = {
    "versions": {"raysae": "0.1.0", "torch": "2.15.0"},
    "python": "3.11.7",
    "git_commit": "abc-dirty",
    "plan": {"workers_per_trial": 2, "gpus": 4},
}


def test_time_gpus_and_origin_of_a_trial_are_in_its_row(records):
    row = trials_table(ended_trials(records), ABOUT).loc[0]
    assert (row["wall_seconds"], row["gpu_hours"]) == (36, pytest.approx(0.02))
    assert row["git_commit"] == "abc-dirty"
    assert json.loads(row["versions"]) == {"python": "3.11.7", "raysae": "0.1.0", "torch": "2.15.0"}
    on_cpu = trials_table(ended_trials(records), ABOUT | {"plan": ABOUT["plan"] | {"gpus": 0}})
    assert set(on_cpu["gpu_hours"]) == {0}
    pack = {"workers_per_trial": 1, "trials_per_pack": 4, "gpus": 4}
    shared = trials_table(ended_trials(records), ABOUT | {"plan": pack})
    assert shared.loc[0, "gpu_hours"] == pytest.approx(0.0025)
    both = trials_table(ended_trials(records), ABOUT | {"plan": pack | {"workers_per_gpu": 2}})
    assert both.loc[0, "gpu_hours"] == pytest.approx(0.00125)


def test_training_parameters_and_dense_features_are_in_the_row(trials: pd.DataFrame, make_spec):
    training = make_spec().training
    assert trials.loc[0, "training.lr"] == training.lr
    assert trials.loc[0, "training.batch_size"] == training.batch_size
    assert trials.loc[0, "dense_features"] == 5
    assert np.isnan(trials.loc[2, "dense_features"])


def test_a_journal_of_an_older_version_still_becomes_tables(records):
    """It has no start of a trial, no dense features and fewer columns of conditioning."""
    added = {"forget_retain_squared_cosine", "largest_principal_angle", "adjusted_rand_index"}
    for record in records:
        rung = record["rung"] if record["event"] == "end" else record
        record.pop("started", None)
        rung.pop("dense_features", None)
        for row in rung.get("conditioning", []):
            for name in added:
                row.pop(name, None)
    row = trials_table(ended_trials(records)).loc[0]
    names = [*added, "dense_features", "wall_seconds"]
    assert row[names].isna().all()
    assert row["condition_number"] > 1
    assert list(conditioning_rows(records).columns) == list(COLUMNS)


def test_a_failed_trial_says_why_and_has_no_figures(trials: pd.DataFrame):
    failed = trials.loc[2]
    assert (failed["state"], failed["status"]) == ("failed", "diverged")
    assert (trials.loc[3, "state"], trials.loc[3, "status"]) == ("failed", "failed")
    assert failed["score"] == 0.0  # what the sampler was told
    assert failed[["heldout_score", "saebench_score", "questions"]].isna().all()
    assert failed["error"] == failed["cause"] == "TrainingDivergedError: loss is nan"
    assert (failed["training_steps"], failed["tokens"]) == (3, 192)  # its last logged row
    assert failed["regularizer"] == "fixed_orthogonal"
    assert failed[["loss", "l0", "forget_accuracy", "condition_number"]].isna().all()


def search_half(rung: Record) -> Record:
    """The record of a rung at which the half that the search sees was asked alone."""
    rung["halves"] |= {"heldout": None, "transferred": None}
    unasked = dict.fromkeys(("heldout_score", "transferred_score", "saebench_score"))
    return rung | unasked | {"questions": "search half"}


def test_a_stopped_trial_has_no_score_on_questions_that_it_was_not_asked(
    make_spec, rung_record, tmp_path: Path
):
    finished = end_record(make_spec(number=0), "finished", rung_record(0, 24, 0.3, last=True), 24)
    rung = search_half(rung_record(1, 8, 0.1))
    stopped = end_record(make_spec(number=1), "stopped", rung, 8)
    for ended in ([finished, stopped], [stopped]):
        write_tables(tmp_path, [], ended)
        for table in ("trials", "seeds"):
            frames = (
                pd.read_parquet(tmp_path / f"{table}.parquet"),
                pd.read_csv(tmp_path / f"{table}.csv"),
            )
            for frame in frames:
                row = frame.set_index("trial").loc[1]
                assert (row["score"], row["questions"]) == (0.1, "search half")
                assert frame["heldout_score"].dtype == frame["saebench_score"].dtype == float
                names = ("heldout_score", "saebench_score", "heldout_forget_accuracy")
                assert row.reindex(names).isna().all()
                transferred = [name for name in frame if name.startswith("transferred_")]
                assert len(transferred) == 8 and row[transferred].isna().all()
    row = trials_table([finished, stopped]).loc[0]
    assert (row["heldout_score"], row["saebench_score"], row["questions"]) == (0.2, 0.225, "all")


def test_divergence_is_known_by_the_name_of_its_error():
    assert TrainingDivergedError.__name__ == DIVERGED_ERROR


def test_a_trial_that_fails_after_a_rung_was_trained_as_far_as_its_curve(make_spec, rung_record):
    error = "TrainingDivergedError: loss is nan at step 20 of 24"
    row = trials_table([end_record(make_spec(), "failed", rung_record(0, 8), 18, error)]).loc[0]
    assert (row["training_steps"], row["tokens"]) == (18, 18 * 64)
    assert (row["state"], row["status"], row["cause"]) == ("failed", "diverged", error)


def test_the_seeds_of_a_trial_have_its_times_and_origin(make_spec, rung_record):
    rung = over_seeds([rung_record(0, 24, s, last=True) | {"sparse_probing": None}
                       for s in (0.1, 0.3)])  # fmt: skip
    spec = make_spec(rungs=(1536,)).model_copy(update={"seeds": 2})
    record = end_record(spec, "finished", rung, 24)
    seeds, whole = seeds_table([record], ABOUT), trials_table([record], ABOUT).loc[0]
    assert list(seeds["score"]) == [0.1, 0.3]
    assert set(seeds["wall_seconds"]) == {36}
    assert seeds["gpu_hours"].sum() == pytest.approx(whole["gpu_hours"]) == pytest.approx(0.02)
    for name in ("git_commit", "versions"):
        assert set(seeds[name]) == {whole[name]}


def test_every_column_is_documented(records):
    """Parameters of methods, schedules and trainings apart, which have their prefix."""
    ended = ended_trials(records)
    for table in (trials_table(ended, ABOUT), seeds_table(ended, ABOUT)):
        extra = set(table.columns) - set(TRIAL_COLUMNS) - {"seed_index"}
        assert all(name.split(".")[0] in ("regularizer", "alpha_schedule", "training")
                   for name in extra)  # fmt: skip
    rows = {name for record in ended for row in record["curve"] for name in row}
    assert rows < set(CURVE_COLUMNS)
    assert list(curves_table(ended).columns) == list(CURVE_COLUMNS)


def test_what_was_measured_on_the_way_is_in_the_conditioning(records):
    """Once, though its rung is scored twice; without baselines, which are nan then."""
    table = conditioning_table(
        np.eye(4), np.ones(4), np.zeros(4), trial=0, step=12, baseline_draws=0
    )
    last = next(r for r in records if r["event"] == "rung" and r["last"])
    last["measured"] = json.loads(table.to_json(orient="records"))
    found = conditioning_rows([*records, last])
    at_step = found[(found["trial"] == 0) & (found["step"] == 12)]
    assert list(at_step["group"]) == ["all", "forget", "retain", "shared"]
    assert at_step["random_condition_number_p50"].isna().all()
    assert at_step["condition_number"].iloc[0] == pytest.approx(1.0)
    assert not found.duplicated(["trial", "seed", "step", "group"]).any()


def test_a_trial_without_an_intervention_has_a_score_and_no_accuracies(make_spec, rung_record):
    rung = rung_record(0, 24, 0.0, last=True)
    nothing = {"best": None, "eligible_features": {"0.001": 0, "0.01": 0}}
    rung["halves"]["search"] |= nothing
    nothing = {"score": 0.0, "status": "nothing_chosen", "cause": "no intervention was chosen"}
    rung |= {"transferred_score": 0.0}
    rung["halves"]["transferred"] = nothing
    row = trials_table([end_record(make_spec(), "finished", rung, 24)]).loc[0]
    assert (row["transferred_score"], row["transferred_status"]) == (0.0, "nothing_chosen")
    assert np.isnan(row["transferred_forget_total"])
    assert (row["score"], row["eligible_features_0.01"], row["l0"]) == (0.0, 0, 4.0)
    names = ["forget_accuracy", "best_multiplier", "heldout_forget_accuracy"]
    assert row[names].isna().all()


def test_what_the_search_saw_and_what_it_did_not_are_told_apart(make_spec, rung_record):
    """Counts of the best intervention are the search half's, the transferred ones the other's."""
    rung = rung_record(0, 24, 0.4, last=True)
    row = trials_table([end_record(make_spec(), "finished", rung, 24)]).loc[0]
    assert (row["score"], row["frontier"], row["forget_correct"]) == (0.4, pytest.approx(0.4), 60)
    assert (row["heldout_score"], row["heldout_forget_accuracy"]) == (0.2, 0.8)
    assert row["saebench_score"] == 0.225


@pytest.mark.parametrize("winner", [True, False])
def test_a_record_from_before_transferred_scores_has_the_counts_that_it_had(
    winner: bool, make_spec, rung_record
):
    rung = rung_record(0, 24, 0.4, last=True)
    del rung["transferred_score"]
    counts = {"forget_correct": 80, "forget_total": 100, "retain_correct": 39, "retain_total": 40}
    rung["halves"]["transferred"] = counts if winner else None
    record = end_record(make_spec(), "finished", rung, 24)
    for table in (trials_table([record]), seeds_table([record])):
        row = table.loc[0]
        assert np.isnan(row["transferred_score"])
        assert row["transferred_status"] is None and row["transferred_cause"] is None
        if winner:
            found = row["heldout_forget_accuracy"], row["transferred_retain_correct"]
            assert found == (0.8, 39)
        assert row["heldout_score"] == 0.2


def test_runs_and_stages_are_in_their_rows(make_spec):
    specs = [
        make_spec(number=0, run="a study's run"),
        make_spec(number=1, run="trial 0", stage="confirmation"),
    ]
    trials = trials_table([end_record(spec, "failed", {}, 0, "x") for spec in specs])
    assert list(trials["run"]) == ["a study's run", "trial 0"]
    assert list(trials["stage"]) == ["search", "confirmation"]
    assert trials["config_hash"].nunique() == 1  # names decide no numbers


def test_equal_configurations_have_equal_hashes(records, trials: pd.DataFrame):
    hashes = list(trials["config_hash"])
    assert hashes == [config_hash(end["spec"]) for end in ended_trials(records)]
    assert len(set(hashes)) == 4  # trial 0 has two rungs, trial 3 one


def test_curves_have_a_row_for_every_logged_step(records):
    curves = curves_table(ended_trials(records))
    counts = curves.groupby("trial").size()
    assert counts.to_dict() == {0: 24, 1: 8, 2: 3}
    assert list(curves.columns[:4]) == ["trial", "step", "tokens", "loss"]
    assert set(metrics(1)) <= set(curves.columns)
    row = curves[(curves["trial"] == 1) & (curves["step"] == 4)].iloc[0]
    assert (row["tokens"], row["loss"]) == (256, 1.25)


def test_conditioning_has_a_row_for_every_trial_step_and_group(records):
    table = conditioning_rows(records)
    assert list(table.columns) == list(COLUMNS)
    groups = ["all", "forget", "retain", "shared", "group:0", "group:1"]
    found = {key: list(part["group"]) for key, part in table.groupby(["trial", "step"])}
    assert found == {(0, 8): groups, (0, 24): groups, (1, 8): groups}


def test_a_rung_scored_twice_after_a_crash_is_one_row_the_later_one(records, rung_record):
    again = {"event": "rung", "trial": 0, "time": 1.0, **rung_record(0, 8)}
    for row in again["conditioning"]:
        row["coherence"] = 0.5
    table = conditioning_rows([*records, again])
    assert len(table) == len(conditioning_rows(records))
    part = table[(table["trial"] == 0) & (table["step"] == 8)]
    assert set(part["coherence"]) == {0.5}


@pytest.mark.parametrize("name", ["trials", "curves", "conditioning"])
def test_tables_come_back_from_parquet_and_csv(name: str, records, trials, tmp_path: Path):
    ended = ended_trials(records)
    tables = {
        "trials": trials,
        "curves": curves_table(ended),
        "conditioning": conditioning_rows(records),
    }
    write_tables(tmp_path, records, ended)
    table = tables[name]
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / f"{name}.parquet"), table, check_dtype=False
    )
    csv = pd.read_csv(tmp_path / f"{name}.csv")
    assert list(csv.columns) == list(table.columns)
    numbers = table.select_dtypes("number")
    pd.testing.assert_frame_equal(csv[numbers.columns], numbers, check_dtype=False)
    if name == "trials":
        assert csv["error"].fillna("").tolist() == table["error"].tolist()


@pytest.mark.parametrize("which", ["none ended", "all failed"])
def test_a_search_without_results_still_writes_tables(which: str, records, tmp_path: Path):
    ended = [r for r in ended_trials(records) if r["state"] == "failed"]
    if which == "none ended":
        ended = []
    write_tables(tmp_path, [], ended)
    assert len(pd.read_parquet(tmp_path / "trials.parquet")) == len(ended)
    columns = pd.read_csv(tmp_path / "trials.csv").columns
    assert list(columns[: len(TRIAL_COLUMNS)]) == list(TRIAL_COLUMNS)
    assert {"trial", "step", "tokens", "loss"} <= set(pd.read_csv(tmp_path / "curves.csv").columns)
    assert pd.read_parquet(tmp_path / "conditioning.parquet").empty


def test_the_best_come_first_and_of_equal_ones_those_with_the_better_frontier():
    trials = pd.DataFrame(
        {"trial": [0, 1, 2, 3], "score": [0.0, 0.2, 0.0, 0.0], "frontier": [0.01, 0.0, 0.03, 0.01]}
    )
    assert best_first(trials)["trial"].tolist() == [1, 2, 0, 3]
    assert best_first(trials.drop(columns="frontier"))["trial"].tolist() == [1, 0, 2, 3]
