"""Optuna's study beside the journal: the same suggestions after a crash, and no trial lost."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
from optuna.samplers import RandomSampler, TPESampler
from optuna.trial import TrialState

from raysae.errors import UserError
from raysae.journal import JOURNAL, ended_trials, read_journal
from raysae.pool.client import WORST_OBJECTIVE
from raysae.pool.folder import trial_folder
from raysae.search.run import _take_up
from raysae.search.study import (
    STUDY,
    STUDY_FILE,
    ResumableSearch,
    SeededByTrial,
    decided_rungs,
    open_storage,
    reconcile,
)
from raysae.search.tune import BaselineSparingASHA
from raysae.training.checkpoint import CHECKPOINT_FILE

TPE = partial(TPESampler, n_startup_trials=2, multivariate=True, group=True)


def space(trial):
    kind = trial.suggest_categorical("kind", ["a", "b"])
    x = trial.suggest_float("x", 0, 1)
    y = trial.suggest_int("y", 1, 100, log=True) if kind == "a" else 0
    return {"number": trial.number, "x": x, "y": y, "kind": kind}


@pytest.mark.parametrize("line", ["[1, 2]", '{"a": 1}'])
def test_a_study_that_cannot_be_read_is_one_message(line: str, tmp_path: Path):
    (tmp_path / STUDY_FILE).write_text(f"{line}\n")
    (tmp_path / "about.json").write_text('{"world_fingerprint": "same"}')
    world = SimpleNamespace(name="w", fingerprint=lambda: "same")
    with pytest.raises(UserError, match=r"optuna.journal cannot be read .*; restore it"):
        _take_up(tmp_path, world)


def test_checkpoints_that_a_killed_worker_has_left_are_removed(tmp_path: Path):
    """Of trials that have ended, or are about to; not of those in flight."""
    ask(tmp_path, 3)
    last = rung(1, 0.5, tokens=30, last=True)
    write(
        tmp_path, *map(submit, range(3)), end(0, "stopped", {"objective": 0.1}), last, rung(2, 0.2)
    )
    (tmp_path / "about.json").write_text('{"world_fingerprint": "same"}')
    files = [trial_folder(tmp_path, number) / CHECKPOINT_FILE for number in range(3)]
    for file in files:
        file.parent.mkdir(parents=True)
        file.touch()
    world = SimpleNamespace(name="w", fingerprint=lambda: "same")
    assert len(_take_up(tmp_path, world)) == 1
    assert [file.exists() for file in files] == [False, False, True]


def value(params) -> float:
    return params["x"] - 0.01 * params["y"]


def suggest(study: optuna.Study, n: int) -> list[dict]:
    found = []
    for _ in range(n):
        trial = study.ask()
        found.append(space(trial))
        study.tell(trial, value(found[-1]))
    return found


@pytest.mark.parametrize("make", [lambda seed: RandomSampler(seed), lambda seed: TPE(seed=seed)])
@pytest.mark.parametrize("interrupted_after", [1, 3, 6])
def test_an_interrupted_search_suggests_what_it_would_have_suggested(
    make, interrupted_after: int, tmp_path: Path
):
    def study(folder: str) -> optuna.Study:
        (tmp_path / folder).mkdir(exist_ok=True)
        return optuna.create_study(
            storage=open_storage(tmp_path / folder), study_name=STUDY, load_if_exists=True,
            sampler=SeededByTrial(make, 5), direction="maximize",
        )  # fmt: skip

    whole = suggest(study("whole"), 10)
    first = suggest(study("cut"), interrupted_after)
    assert first + suggest(study("cut"), 10 - interrupted_after) == whole
    assert len({p["x"] for p in whole}) == 10


def test_another_seed_suggests_something_else():
    a, b = (
        suggest(optuna.create_study(sampler=SeededByTrial(RandomSampler, seed)), 3)
        for seed in (0, 1)
    )
    assert [p["x"] for p in a] != [p["x"] for p in b]


def write(run_dir: Path, *records: dict) -> None:
    lines = [json.dumps({"time": 1.0, **r}) + "\n" for r in records]
    (run_dir / JOURNAL).write_text("".join(lines))


def submit(trial: int) -> dict:
    spec = {"number": trial, "rungs": [10, 30]}
    return {"event": "submit", "trial": trial, "spec": spec, "session": "one"}


def rung(trial: int, objective: float, tokens: int = 10, last: bool = False) -> dict:
    return {"event": "rung", "trial": trial, "tokens": tokens, "objective": objective,
            "last": last, "curve": [{"step": 1}]}  # fmt: skip


def end(trial: int, state: str, rung: dict) -> dict:
    return {"event": "end", "trial": trial, "state": state,
            "spec": {"number": trial, "rungs": [10, 30]},
            "error": "", "rung": rung, "curve": []}  # fmt: skip


def proceed(trial: int, tokens: int = 10) -> dict:
    return {"event": "proceed", "trial": trial, "tokens": tokens}


def ask(run_dir: Path, n: int) -> optuna.Study:
    study = optuna.create_study(
        storage=open_storage(run_dir), study_name=STUDY, direction="maximize"
    )
    for _ in range(n):
        space(study.ask())
    return study


def test_a_new_search_has_nothing_to_reconcile(tmp_path: Path):
    assert reconcile(tmp_path, open_storage(tmp_path)) is None


def test_what_the_journal_knows_the_study_learns(tmp_path: Path):
    """Killed after a trial's end was recorded and before Optuna was told."""
    ask(tmp_path, 3)
    write(
        tmp_path,
        *(submit(n) for n in range(3)),
        end(0, "finished", {"objective": 0.5}),
        end(1, "failed", {}),
        rung(2, 0.1),
    )
    storage = open_storage(tmp_path)
    in_flight = reconcile(tmp_path, storage)
    trials = optuna.load_study(study_name=STUDY, storage=storage).trials
    states = [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.RUNNING]
    assert [t.state for t in trials] == states
    assert (trials[0].value, trials[1].value) == (0.5, 0.0)
    assert in_flight == [trials[2]._trial_id]


def test_what_the_study_knows_the_journal_learns(tmp_path: Path):
    """Killed after the scheduler had stopped a trial and before that was recorded."""
    study = ask(tmp_path, 2)
    study.tell(0, 0.1)
    write(tmp_path, submit(0), submit(1), rung(0, 0.1))
    assert reconcile(tmp_path, open_storage(tmp_path)) == [study.trials[1]._trial_id]
    (found,) = ended_trials(read_journal(tmp_path / JOURNAL))
    assert (found["trial"], found["state"], found["rung"]["objective"]) == (0, "stopped", 0.1)
    assert found["curve"] == [{"step": 1}]
    assert reconcile(tmp_path, open_storage(tmp_path)) == [study.trials[1]._trial_id]


def test_a_trial_that_failed_after_a_rung_is_told_to_the_study_as_its_client_tells_it(
    tmp_path: Path,
):
    ask(tmp_path, 1)
    write(tmp_path, submit(0), rung(0, 0.4), proceed(0), end(0, "failed", {"objective": 0.4}))
    storage = open_storage(tmp_path)
    assert reconcile(tmp_path, storage) == []
    (trial,) = optuna.load_study(study_name=STUDY, storage=storage).trials
    assert (trial.state, trial.value) == (TrialState.COMPLETE, WORST_OBJECTIVE)


@pytest.mark.parametrize("told", [True, False])
def test_a_trial_whose_last_rung_was_recorded_has_finished(told: bool, tmp_path: Path):
    """Killed between that record and the next, before or after Optuna was told."""
    study = ask(tmp_path, 1)
    if told:
        study.tell(0, 0.5)
    write(tmp_path, submit(0), rung(0, 0.4), proceed(0), rung(0, 0.5, tokens=30, last=True))
    storage = open_storage(tmp_path)
    assert reconcile(tmp_path, storage) == []
    (found,) = ended_trials(read_journal(tmp_path / JOURNAL))
    assert (found["state"], found["rung"]["tokens"]) == ("finished", 30)
    (trial,) = optuna.load_study(study_name=STUDY, storage=storage).trials
    assert (trial.state, trial.value) == (TrialState.COMPLETE, 0.5)


def test_a_study_cut_off_in_the_middle_of_a_line_under_a_stale_lock_is_read(tmp_path: Path):
    ask(tmp_path, 2)
    path = tmp_path / "optuna.journal"
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    (tmp_path / "optuna.journal.lock").symlink_to(path)
    study = optuna.load_study(study_name=STUDY, storage=open_storage(tmp_path))
    assert len(study.trials) == 2
    study.ask()


def test_trials_in_flight_are_suggested_again_before_new_ones(tmp_path: Path):
    study = ask(tmp_path, 3)
    before = [t.params for t in study.trials]
    search = ResumableSearch(
        space=space, metric="m", mode="max", study_name=STUDY, storage=open_storage(tmp_path),
        sampler=SeededByTrial(RandomSampler, 0),
        in_flight=[t._trial_id for t in study.trials[1:]],
    )  # fmt: skip
    found = [search.suggest(f"tune {n}") for n in range(3)]
    assert [f["number"] for f in found] == [1, 2, 3]
    assert [f["x"] for f in found[:2]] == [p["x"] for p in before[1:]]
    search.on_trial_complete("tune 0", {"m": 0.25})
    told = optuna.load_study(study_name=STUDY, storage=open_storage(tmp_path)).trials[1]
    assert (told.state, told.value) == (TrialState.COMPLETE, 0.25)


def test_only_rungs_that_were_decided_on_are_decided(tmp_path: Path):
    write(
        tmp_path,
        *(submit(n) for n in range(4)),
        rung(0, 0.4), proceed(0), rung(0, 0.9, tokens=30, last=True), end(0, "finished", {}),
        rung(1, 0.1), end(1, "stopped", {}),
        rung(2, 0.3), proceed(2),
        rung(3, 0.2),
    )  # fmt: skip
    found = decided_rungs(read_journal(tmp_path / JOURNAL))
    assert [(r["number"], r["tokens"], r["objective"]) for r in found] == [
        (0, 10, 0.4), (1, 10, 0.1), (2, 10, 0.3)
    ]  # fmt: skip
    assert [r["rungs"] for r in found] == [[10, 30]] * 3


class FakeTrial:
    def __init__(self, number: int, rungs: tuple[int, ...] = (10, 30)) -> None:
        self.trial_id = f"t{number}"
        self.config = {"spec": {"number": number, "rungs": list(rungs)}}


def decided(number: int, objective: float) -> dict:
    return {"number": number, "tokens": 10, "rungs": [10, 30], "objective": objective}


def test_asha_decides_after_a_restart_as_it_would_have_before():
    scores = [0.5, 0.1, 0.4, 0.2, 0.6, 0.3, 0.45, 0.55]

    def decide(past: list[dict], numbers: range) -> list[str]:
        scheduler = BaselineSparingASHA(past, rungs=1, reduction_factor=3)
        scheduler.set_search_properties("objective", "max")
        words = []
        for number in numbers:
            trial = FakeTrial(number)
            scheduler.on_trial_add(None, trial)
            result = {"tokens": 10, "objective": scores[number], "number": number}
            words.append(scheduler.on_trial_result(None, trial, result))
        return words

    whole = decide([], range(8))
    past = [decided(n, scores[n]) for n in range(4)]
    assert decide(past, range(4, 8)) == whole[4:]
    assert len(set(whole)) == 2
    assert decide([], range(4, 8)) != whole[4:], "the test must need the past"


@pytest.mark.parametrize("number", [0, 3])
def test_a_trial_that_ends_after_a_restart_counts_once_at_the_rung_behind_it(number: int):
    """Tune tells of a result again when the trial ends, and knows it by another id than before."""
    past = [decided(n, s) for n, s in enumerate([0.5, 0.1, 0.4, 0.6])]
    scheduler = BaselineSparingASHA(past, rungs=1, reduction_factor=3)
    scheduler.set_search_properties("objective", "max")
    trial = FakeTrial(number)
    last = {"tokens": 30, "objective": 0.9, "number": number}
    scheduler.on_trial_add(None, trial)
    scheduler.on_trial_result(None, trial, last)
    scheduler.on_trial_complete(None, trial, last)
    later = FakeTrial(4)
    scheduler.on_trial_add(None, later)
    # Of 0.1, 0.4, 0.5 and 0.6 the upper third begins at 0.5; with 0.9 counted too, at 0.57.
    result = {"tokens": 10, "objective": 0.52, "number": 4}
    assert scheduler.on_trial_result(None, later, result) == scheduler.CONTINUE


@pytest.mark.parametrize("lengths", [(300, 900), (294, 882), (900, 2700)])
def test_trials_of_another_length_or_batch_size_are_stopped_at_the_same_rungs(lengths):
    """Each at a ninth and a third of its own run, at fewer tokens than the first too."""
    scheduler = BaselineSparingASHA([], rungs=2, reduction_factor=3)
    scheduler.set_search_properties("objective", "max")

    def words(number: int, total: int, objectives: tuple[float, ...]) -> list[str]:
        trial = FakeTrial(number, (total // 9, total // 3, total))
        scheduler.on_trial_add(None, trial)
        told = zip(trial.config["spec"]["rungs"], objectives, strict=False)
        return [
            scheduler.on_trial_result(None, trial, {"tokens": t, "objective": o}) for t, o in told
        ]

    go, stop = scheduler.CONTINUE, scheduler.STOP
    short, long = lengths
    assert words(1, short, (0.5, 0.6)) == [go, go]
    assert words(2, long, (0.4,)) == [stop]  # 0.5 at the first rung
    assert words(3, long, (0.7, 0.5)) == [go, stop]  # 0.6 at the second
    assert words(4, short, (0.7, 0.7, 0.1)) == [go, go, stop]  # at its end, whatever it is
