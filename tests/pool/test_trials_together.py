"""Trials that a worker trains together are those that it trains alone, and end each for itself."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from sae_lens import SAE
from safetensors import SafetensorError
from worker_bench import Decide, FakeArtifacts, FakeBroker, FakeEvaluator, make_worker

from raysae.pool import together as lock_step
from raysae.pool import worker as module
from raysae.pool.folder import LAST_GOOD_FOLDER, trial_folder
from raysae.pool.worker import Worker
from raysae.store.batches import ChunkedActivations
from raysae.store.one_copy import LostCopyError
from raysae.training.checkpoint import CHECKPOINT_FILE, Pace
from raysae.training.run import Rung
from raysae.training.spec import TrialSpec
from raysae.unlearning import split_questions

FIRST_RUNG, END = 8 * 64, 24 * 64


def go_on(*_: Any) -> str:
    return "go"


@pytest.fixture
def bench(tmp_path: Path, make_store, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run trials on a worker: its broker, and the worker."""
    monkeypatch.setattr("ray.get", lambda answers: answers)
    monkeypatch.setattr(module, "Artifacts", FakeArtifacts)

    def run(
        *specs: TrialSpec,
        decide: Decide = go_on,
        name: str = "run",
        evaluator: FakeEvaluator | None = None,
        make_evaluator: Callable[[], FakeEvaluator] | None = None,
        over: bool = False,
    ) -> tuple[FakeBroker, Worker]:
        broker = FakeBroker(decide)
        broker.over = over
        evaluator = evaluator or FakeEvaluator()
        make = make_evaluator or (lambda: evaluator)
        worker = make_worker(tmp_path / name, make_store(), broker, make)
        worker._run(list(specs))
        return broker, worker

    return run


@pytest.fixture
def trials(make_spec) -> list[TrialSpec]:
    """Three of one shape, which differ in all that may differ."""
    differ = [
        {"regularizer": "none", "sparsity": 3, "lr": 1e-3},
        {
            "regularizer": "grouped",
            "parameters": {"group_update_period": 4, "n_groups": 4},
            "alpha": 2.0,
            "sparsity": 5,
            "lr": 5e-3,
            "schedule": "cosine",
            "dead_after": 3,
        },
        {"regularizer": "fixed_orthogonal", "alpha": 0.5, "lr_warmup": 0.3, "grad_clip": 0.1},
    ]
    specs = [
        make_spec("topk", number=i, seed=10 + i, rungs=(FIRST_RUNG, END), **one)
        for i, one in enumerate(differ)
    ]
    return [specs[0], specs[1].model_copy(update={"seeds": 2}), specs[2]]


def assert_same(found: FakeBroker, expected: FakeBroker, number: int) -> None:
    """What the broker heard of the trial, to float32's rounding."""
    assert len(found.rows[number]) == len(expected.rows[number]) > 0
    pairs = [*zip(found.rows[number], expected.rows[number], strict=True)]
    rungs = [*zip(found.rungs[number], expected.rungs[number], strict=True)]
    pairs += [(ours["metrics"], wanted["metrics"]) for ours, wanted in rungs]
    for ours, wanted in pairs:
        assert ours == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    for ours, wanted in rungs:
        assert ours["score"] == pytest.approx(wanted["score"], rel=1e-4)
        assert (ours["tokens"], ours["last"]) == (wanted["tokens"], wanted["last"])
        assert [row["seed"] for row in ours["measured"]] == [
            row["seed"] for row in wanted["measured"]
        ]
        for row, other in zip(ours["measured"], wanted["measured"], strict=True):
            assert row == pytest.approx(other, rel=1e-3, abs=1e-5)


# --- What is asked --------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [True, False])
def test_before_the_end_the_search_half_of_the_questions_is_asked_alone(
    together: bool, bench, trials
):
    _, worker = bench(*(trials if together else trials[1:2]))
    assert [step for step, _ in worker.evaluator.asked] == [8, 24]
    first, last = worker.evaluator.questions
    wanted = split_questions(FakeEvaluator.known_questions, 7)
    assert first.keys() == wanted.keys()
    assert all(np.array_equal(first[name], wanted[name]) for name in wanted)
    assert last is None


def test_a_trial_that_is_scored_once_is_asked_everything(bench, make_spec):
    _, worker = bench(make_spec("topk", rungs=(END,)))
    assert worker.evaluator.questions == [None]


# --- The same numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("stopped", [None, 0, 1])
def test_trials_together_are_what_they_are_alone(stopped: int | None, bench, trials):
    """One of them is stopped at its first rung, and those beside it go on."""

    def decide(call: str, number: int, _: dict[str, Any]) -> str:
        return "stop" if call == "rung" and number == stopped else "go"

    together, worker = bench(*trials, decide=decide)
    left = sum(spec.seeds for spec in trials if spec.number != stopped)
    assert worker.evaluator.asked == [(8, 4), (24, left)]
    assert not together.failed
    for spec in trials:
        alone, _ = bench(spec, decide=decide, name=f"alone {spec.number}")
        assert len(alone.rungs[spec.number]) == (1 if spec.number == stopped else 2)
        assert_same(together, alone, spec.number)


def test_a_trial_that_diverges_ends_alone_with_its_last_good_sae(bench, trials, tmp_path: Path):
    wild = {"lr": 1e30, "lr_warmup": 0.0}
    training = trials[1].training.model_copy(update=wild)
    trials[1] = trials[1].model_copy(update={"training": training})
    together, _ = bench(*trials)
    assert set(together.failed) == {1}
    assert "TrainingDivergedError: loss is" in together.failed[1]
    folder = trial_folder(tmp_path / "run", 1)
    assert (folder / LAST_GOOD_FOLDER / "sae_weights.safetensors").is_file()
    assert "TrainingDivergedError" in (folder / "error.log").read_text()
    for number in (0, 2):
        alone, _ = bench(trials[number], name=f"alone {number}")
        assert_same(together, alone, number)


# --- Errors ---------------------------------------------------------------------------------------


def test_a_trial_whose_files_cannot_be_written_ends_alone(
    bench, trials, monkeypatch: pytest.MonkeyPatch
):
    write = FakeArtifacts.write

    def fragile(self: FakeArtifacts, spec: TrialSpec, *args: Any) -> dict[str, Any]:
        if spec.number == 0:
            raise PermissionError(errno.EACCES, "Permission denied")
        return write(self, spec, *args)

    monkeypatch.setattr(FakeArtifacts, "write", fragile)
    broker, worker = bench(*trials)
    assert set(broker.failed) == {0} and "Permission denied" in broker.failed[0]
    assert worker.evaluator.asked == [(8, 4), (24, 3)]
    assert [record["last"] for record in broker.rungs[2]] == [False, True]


def test_an_error_of_all_is_that_of_the_one_who_raises_alone(bench, trials):
    """Scoring fails for one SAE, and with it for all that are scored with it."""

    class Picky(FakeEvaluator):
        def score(self, sae: Any) -> float:
            if sae.cfg.k == 5:
                raise ValueError("five are too many")
            return super().score(sae)

    together, worker = bench(*trials, evaluator=Picky())
    assert set(together.failed) == {1} and "five are too many" in together.failed[1]
    assert worker.evaluator.asked == [(8, 4), (8, 1), (24, 1), (8, 2), (8, 1), (24, 1)]
    for number in (0, 2):
        alone, _ = bench(trials[number], name=f"alone {number}")
        assert [r["score"] for r in together.rungs[number]] == pytest.approx(
            [r["score"] for r in alone.rungs[number]], rel=1e-5
        )


def test_a_trial_that_cannot_begin_is_left_out(bench, trials, make_spec):
    bad = make_spec("topk", "grouped", {"group_update_period": 25}, number=1)
    broker, worker = bench(trials[0], bad, trials[2])
    assert set(broker.failed) == {1} and "longer than the run" in broker.failed[1]
    assert worker.evaluator.asked == [(8, 2), (24, 2)]


def test_the_loss_of_the_activations_on_the_gpu_ends_the_worker_and_fails_no_trial(
    bench, trials, monkeypatch: pytest.MonkeyPatch
):
    """Ray Train restarts it then, and the trials go on from their checkpoints."""
    delivered, brokers = [], []
    take, real = ChunkedActivations._take, FakeBroker.__init__

    def noted(self: FakeBroker, decide: Decide) -> None:
        real(self, decide)
        brokers.append(self)

    def lost(self: ChunkedActivations, *args: Any) -> Any:
        delivered.append(args)
        if len(delivered) > 10:
            raise LostCopyError("process 7 has ended")
        return take(self, *args)

    monkeypatch.setattr(ChunkedActivations, "_take", lost)
    monkeypatch.setattr(FakeBroker, "__init__", noted)
    with pytest.raises(LostCopyError, match="process 7"):
        bench(*trials)
    (broker,) = brokers
    assert broker.failed == {} and broker.halted == ""
    assert len(delivered) == 11


# --- What is no trial's doing ---------------------------------------------------------------------


def no_space_at(path: Path) -> None:
    """What is written there meets a full disk, as the system has it and the library reports it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to("/dev/full")


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Of the three trials, which are saved with every row of their curves."""
    monkeypatch.setattr(Pace, "is_due", lambda _: True)
    return [trial_folder(tmp_path / "run", number) for number in range(3)]


@pytest.mark.parametrize("file", ["SAE", "checkpoint", "log", "last good SAE", "other"])
def test_a_full_disk_fails_no_trial_and_leaves_the_checkpoints(
    file: str, bench, trials, folders, monkeypatch: pytest.MonkeyPatch
):
    """Whatever there was no room for, also of a trial that would have failed."""
    folder = folders[1]
    if file in ("log", "last good SAE"):
        training = trials[1].training.model_copy(update={"lr": 1e30, "lr_warmup": 0.5})
        trials[1] = trials[1].model_copy(update={"training": training})
    if file == "log":
        no_space_at(folder / "error.log")

    def save_model(*_: Any) -> None:  # as safetensors does, see test_full_disk.py
        words = "Error while serializing: I/O error: No space left on device (os error 28)"
        raise SafetensorError(words)

    def write(self: FakeArtifacts, _: TrialSpec, rung: Rung, __: Any) -> None:
        if file == "other":
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        rung.sae.save_model(self.folder / "sae")

    def decide(what: str, number: int, row: dict[str, Any]) -> str:
        if file == "checkpoint" and (what, number, row["step"]) == ("progress", 1, 5):
            no_space_at(folder / "checkpoint.partial")
        return "go"

    monkeypatch.setattr(FakeArtifacts, "write", write)
    if file != "log":
        monkeypatch.setattr(SAE, "save_model", save_model)
    broker, _ = bench(*trials, decide=decide)
    assert broker.failed == {}
    words = "Disk quota exceeded" if file == "other" else "No space left on device"
    assert re.search(f"cannot be written to: .*{words}", broker.halted)
    assert sorted(broker.saved) == [0, 1, 2]
    kept = [torch.load(one / CHECKPOINT_FILE)["runs"][0]["step"] for one in folders]
    assert kept == {"checkpoint": [5, 4, 4]}.get(file, kept)
    assert min(kept) > 0
    assert [path for one in folders for path in one.rglob("*.partial*")] == []


def test_a_checkpoint_is_there_until_the_broker_knows_that_its_trial_has_failed(
    bench, trials, folders, monkeypatch: pytest.MonkeyPatch
):
    there: list[bool] = []
    fail = FakeBroker._fail

    def spy(self: FakeBroker, number: int, *args: Any) -> bool:
        there.append((folders[number] / CHECKPOINT_FILE).is_file())
        return fail(self, number, *args)

    class Picky(FakeEvaluator):
        def score(self, sae: Any) -> float:
            raise ValueError("no score")

    monkeypatch.setattr(FakeBroker, "_fail", spy)
    broker, _ = bench(trials[0], evaluator=Picky())
    assert there == [True] and set(broker.failed) == {0}
    assert not (folders[0] / CHECKPOINT_FILE).exists()


def test_a_trial_that_raises_while_the_search_ends_is_left_for_a_later_session(
    bench, trials, folders
):
    class Picky(FakeEvaluator):
        def score(self, sae: Any) -> float:
            raise ValueError("no score")

    broker, _ = bench(trials[0], evaluator=Picky(), over=True)
    assert broker.failed == {} and broker.saved == [0]
    assert torch.load(folders[0] / CHECKPOINT_FILE)["runs"][0]["step"] == 8


def raised_by_a_task(error: Exception) -> Exception:
    trace = f"ray::evaluation_cache() (pid=7)\n  File a.py\n{type(error).__name__}: {error}"
    return ray.exceptions.RayTaskError("evaluation_cache", trace, error).as_instanceof_cause()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ray.exceptions.WorkerCrashedError(), "WorkerCrashedError: The worker died unexpectedly"),
        (ray.exceptions.ObjectLostError("ab", None, ""), "ObjectLostError: "),
        (FileNotFoundError("no evaluation cache"), "FileNotFoundError: no evaluation cache"),
        (raised_by_a_task(ValueError("no questions")), "ValueError: no questions"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_evaluator_that_cannot_be_had_ends_the_search_and_no_trial(
    error: Exception, words: str, bench, trials, folders, tmp_path: Path
):
    def missing() -> FakeEvaluator:
        raise error

    broker, _ = bench(*trials, make_evaluator=missing)
    assert broker.failed == {} and broker.saved == [0, 1, 2]
    log = tmp_path / "run" / "worker_error.log"
    assert broker.halted.startswith(f"trials cannot be scored: {words}")
    assert broker.halted.endswith(f"(log: {log})")
    assert type(error).__name__ in log.read_text()
    assert [torch.load(one / CHECKPOINT_FILE)["runs"][0]["step"] for one in folders] == [8] * 3


def test_trials_that_leave_no_memory_for_the_evaluator_are_scored_one_by_one(bench, trials):
    asked: list[int] = []

    def make() -> FakeEvaluator:
        asked.append(1)
        if len(asked) == 1:
            raise torch.OutOfMemoryError("out of memory")
        return FakeEvaluator()

    broker, worker = bench(*trials, make_evaluator=make)
    assert broker.failed == {} and broker.halted == ""
    assert worker.evaluator.asked == [(8, 1), (24, 1), (8, 2), (24, 2), (8, 1), (24, 1)]


def test_a_lost_object_ends_the_search_and_no_trial(bench, trials, monkeypatch: pytest.MonkeyPatch):
    def write(*_: Any) -> None:
        raise ray.exceptions.OwnerDiedError("ab", None, "")

    monkeypatch.setattr(FakeArtifacts, "write", write)
    broker, _ = bench(*trials)
    assert broker.failed == {} and broker.saved == [0, 1, 2]
    assert broker.halted.startswith("OwnerDiedError: ")


# --- Saved, and taken up again --------------------------------------------------------------------


@pytest.mark.parametrize("call", ["progress", "rung"])
def test_a_pause_saves_every_trial_in_its_own_folder_to_be_taken_up_together(
    call: str, bench, trials, tmp_path: Path
):
    """Also where only one of them has heard of it in time."""

    def decide(what: str, number: int, record: dict[str, Any]) -> str:
        here = what == call and record["step"] == 8 and number == 1
        return "pause" if here else "go"

    first, _ = bench(*trials, decide=decide)
    assert first.saved == [0, 1, 2] and not first.failed
    files = [trial_folder(tmp_path / "run", n) / CHECKPOINT_FILE for n in range(3)]
    assert all(file.is_file() for file in files)
    assert [len(torch.load(file)["runs"]) for file in files] == [1, 2, 1]

    second, worker = bench(*trials)
    assert worker.evaluator.asked == [(8, 4), (24, 4)]
    whole, _ = bench(*trials, name="whole")
    for number in range(3):
        assert second.rungs[number] == whole.rungs[number]
        assert first.rows[number] + second.rows[number] == whole.rows[number]
    assert not any(file.exists() for file in files)


def test_trials_that_were_saved_at_different_steps_are_trained_one_after_the_other(bench, trials):
    def decide(_: str, __: int, record: dict[str, Any]) -> str:
        return "pause" if record["step"] == 5 else "go"

    bench(trials[2], decide=decide)
    broker, worker = bench(*trials)
    assert worker.evaluator.asked == [(8, 3), (24, 3), (8, 1), (24, 1)]
    for number in range(3):
        assert [record["last"] for record in broker.rungs[number]] == [False, True]


def test_trials_trained_together_are_saved_at_the_same_step(
    bench, trials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    files = [trial_folder(tmp_path / "run", n) / CHECKPOINT_FILE for n in range(3)]
    monkeypatch.setattr(Pace, "is_due", lambda _: True)
    saved: list[list[int]] = []

    def decide(_: str, number: int, record: dict[str, Any]) -> str:
        if number == 0 and record["step"] > 1:
            saved.append([torch.load(file)["runs"][0]["step"] for file in files])
        return "go"

    bench(*trials, decide=decide)
    assert saved[:3] == [[1] * 3, [2] * 3, [3] * 3]
    assert len(saved) > 20 and all(len(set(steps)) == 1 for steps in saved)


@pytest.mark.parametrize("how", ["asked to", "killed"])
def test_trials_saved_between_two_rows_end_as_if_never_interrupted(
    how: str, bench, make_spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A row is six steps; all that a broker hears is compared exactly."""
    monkeypatch.setattr(lock_step, "WORD_SECONDS", 0.0)
    monkeypatch.setattr(Pace, "is_due", lambda _: how == "killed")
    steps = 400
    specs = [
        make_spec("topk", name, {"group_update_period": 5, "n_groups": 4} if groups else {},
                  steps=steps, batch_size=16, rungs=(16 * 99, 16 * steps), number=i, seed=i)
        for i, (name, groups) in enumerate((("none", False), ("grouped", True)))
    ]  # fmt: skip
    specs[1] = specs[1].model_copy(update={"seeds": 2})
    files = [trial_folder(tmp_path / "run", n) / CHECKPOINT_FILE for n in range(2)]
    asked = iter(range(10_000))

    def decide(call: str, number: int, _: dict[str, Any]) -> str:
        """They are wanted no more after 110 of the steps that end no row."""
        if call == "words" and number == 1 and next(asked) == 110:
            if how == "killed":
                raise LostCopyError("the worker goes")
            return "pause"
        return "go"

    brokers = []
    real = FakeBroker.__init__
    monkeypatch.setattr(
        FakeBroker, "__init__", lambda self, d: (real(self, d), brokers.append(self))[0]
    )
    with suppress(LostCopyError):
        bench(*specs, decide=decide)
    first = brokers[-1]
    assert first.saved == ([0, 1] if how == "asked to" else []) and not first.failed
    saved = [run for file in files for run in torch.load(file)["runs"]]
    at = saved[0]["step"]
    assert [run["step"] for run in saved] == [at] * 3 and at > 99
    assert all(run["under_way"]["steps"] == at - run["curve"][-1]["step"] > 0 for run in saved)

    second, _ = bench(*specs)
    whole, _ = bench(*specs, name="whole")
    for number in range(2):
        assert first.rungs[number] + second.rungs[number] == whole.rungs[number]
        assert first.rows[number] + second.rows[number] == whole.rows[number]
    assert not any(file.exists() for file in files)
