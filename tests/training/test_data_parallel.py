"""Two processes that share a trial hold the same SAE at every step, and learn what one would.

The processes come from a fork server that has imported what they need: a quarter of a minute once,
instead of once a process.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from training_bench import METHODS, small

from raysae.store.batches import ChunkedActivations
from raysae.training.collective import Alone, Group
from raysae.training.loop import Between, _Moments, train, train_one
from raysae.training.run import Progress, Rung, SAERun
from raysae.training.schedules import Dynamic
from raysae.training.spec import TrialSpec
from raysae.unlearning import UnlearningResult, UnlearningStatus
from raysae.unlearning.result import refused

STEPS, PROCESSES = 20, 2
CASES: dict[str, dict[str, Any]] = {
    "standard": {"architecture": "standard"},
    "dead features": {"architecture": "topk", "sparsity": 1.0, "batch_size": 8, "dead_after": 2},
    "dynamic": {"regularizer": "task_masked", "parameters": small("task_masked")},
} | {method: {"regularizer": method, "parameters": small(method)} for method in METHODS}


@dataclass
class Record:
    """What one process saw of a trial."""

    decoders: list[Tensor]  # after every step
    states: list[dict[str, Tensor]]  # of the regularizer, after every step
    curve: list[Progress]
    rungs: list[tuple[int, Tensor, Tensor]]  # step and firing rates
    stopped_at: int  # when the listener says no at step 5
    long_curve: list[Progress]  # of a training with rows of several steps
    taken_up: list[Progress]  # of the same, saved in the middle of a row and taken up again
    saved_at: int


def score(*_: Any) -> UnlearningResult:
    return refused("cached", UnlearningStatus.untrained, "not scored here")


def observe(spec: TrialSpec, store: ChunkedActivations, collective: Alone) -> Record:
    run = SAERun(spec, store, collective=collective)
    record = Record([], [], [], [], 0, [], [], 0)
    for _ in range(STEPS):
        run.advance()
        record.decoders.append(run.sae.W_dec.detach().clone())
        record.states.append({k: v.clone() for k, v in run.regularizer_state.items()})

    def listen(event: Progress | Rung) -> bool:
        if isinstance(event, Progress):
            record.curve.append(event)
        else:
            record.rungs.append((event.step, event.forget_rate, event.retain_rate))
        return True

    train_one(SAERun(spec, store, collective=collective), score, listen)
    stopping = SAERun(spec, store, collective=collective)
    train_one(stopping, score, lambda event: event.step < 5)
    record.stopped_at = stopping.step
    interrupt(record, lambda: SAERun(spec, store, collective=collective))
    return record


def interrupt(record: Record, begin: Callable[[], SAERun]) -> None:
    """Train with rows of five steps; once without end, once saved after the first of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("raysae.training.loop.CURVE_POINTS", STEPS // 5)
        patch.setattr("raysae.training.loop.AGREE_SECONDS", 0.0)  # at every step

        def go(run: SAERun, between: Between | None = None) -> SAERun:
            train([run], lambda *_: [score()], lambda events: [True] * len(events), between=between)
            return run

        record.long_curve = go(begin()).curve
        killed, saved = begin(), io.BytesIO()

        def leave() -> list[bool]:
            torch.save(killed.state_dict(), saved)
            return [False]

        go(killed, Between(lambda: killed.step > 5, leave))
        record.saved_at = killed.step
        resumed = begin()
        # The first process alone has saved it.
        data = resumed.collective.broadcast(saved.getvalue())
        resumed.load_state_dict(torch.load(io.BytesIO(data), weights_only=True))
        record.taken_up = go(resumed).curve


def one_of_two(
    rank: int, folder: Path, specs: dict[str, TrialSpec], store: ChunkedActivations
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES
    )
    group = Group(dist.new_group(list(range(PROCESSES))))
    assert (group.rank, group.size) == (rank, PROCESSES)
    torch.save({name: observe(s, store, group) for name, s in specs.items()}, folder / f"{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data_parallel")


@pytest.fixture
def records(folder: Path, make_spec, make_store) -> tuple[dict[str, Record], ...]:
    """By case: the two processes' records, and that of one process alone; made once."""
    if not (folder / "alone").exists():
        specs = {
            name: make_spec(steps=STEPS, lr=5e-3, step="saelens", **case)
            for name, case in CASES.items()
        }
        feedback = Dynamic(target=0.5, every=4)
        specs["dynamic"] = specs["dynamic"].model_copy(update={"alpha_schedule": feedback})
        store = make_store()
        forkserver.set_forkserver_preload(["raysae.training.loop", "sklearn.cluster"])
        arguments = (folder, specs, store)
        mp.start_processes(one_of_two, arguments, nprocs=PROCESSES, start_method="forkserver")
        alone = {name: observe(spec, store, Alone()) for name, spec in specs.items()}
        torch.save(alone, folder / "alone")
    return load(folder)


@functools.cache
def load(folder: Path) -> tuple[dict[str, Record], ...]:
    return tuple(torch.load(folder / name, weights_only=False) for name in ("0", "1", "alone"))


every_case = pytest.mark.parametrize("case", CASES)


@every_case
def test_both_processes_hold_the_same_sae_and_groups_at_every_step(case: str, records):
    first, second, _ = (record[case] for record in records)
    assert len(first.decoders) == STEPS
    for a, b in zip(first.decoders, second.decoders, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(first.states, second.states, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


@every_case
def test_two_processes_learn_what_one_learns(case: str, records):
    two, _, one = (record[case] for record in records)
    for a, b in zip(two.decoders, one.decoders, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    for a, b in zip(two.states, one.states, strict=True):
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-5)


@every_case
def test_the_curve_is_that_of_one_process(case: str, records):
    two, _, one = (record[case].curve for record in records)
    assert [row.step for row in two] == [row.step for row in one] == list(range(1, STEPS + 1))
    for a, b in zip(two, one, strict=True):
        assert a.tokens == b.tokens
        assert a.metrics == pytest.approx(b.metrics, rel=1e-4, abs=1e-6)


@every_case
def test_firing_rates_count_the_tokens_of_both_processes(case: str, records):
    two, _, one = (record[case].rungs for record in records)
    for (step, *rates), (wanted_step, *wanted) in zip(two, one, strict=True):
        assert step == wanted_step == STEPS
        torch.testing.assert_close(rates, wanted, rtol=0, atol=1e-4)


def test_only_the_first_process_talks_and_its_word_ends_the_trial_for_both(records):
    for case in CASES:
        first, second, _ = (record[case] for record in records)
        assert len(first.curve) == STEPS
        assert second.curve == second.rungs == []
        assert first.stopped_at == second.stopped_at == 5


@every_case
def test_a_trial_saved_in_the_middle_of_a_row_is_taken_up_by_both(case: str, records):
    """Each goes on with its own sums; they leave and are saved at the same step."""
    first, second, alone = (record[case] for record in records)
    for record in (first, second, alone):
        assert record.saved_at == 6
        assert [row.step for row in record.long_curve] == [5, 10, 15, 20]
        assert record.taken_up == record.long_curve


@pytest.mark.parametrize("rank", [0, 1])
def test_workers_that_train_together_agree_about_once_a_second(
    rank: int, monkeypatch: pytest.MonkeyPatch
):
    """Steps of 10 ms, of which the first takes long; both ranks take rank 0's word."""
    now = [0.0]
    monkeypatch.setattr("raysae.training.loop.time.perf_counter", lambda: now[0])
    words: list[Any] = []  # of rank 0
    heard: list[int] = []

    def broadcast(word: Any) -> Any:
        heard.append(step)
        words.append(word if word is not None else (True, [1, 8, 64, 100][min(len(heard) - 1, 3)]))
        return words[-1]

    collective = SimpleNamespace(size=2, rank=rank, broadcast=broadcast)
    moments = _Moments(Between(lambda: True, list), SimpleNamespace(step=0, collective=collective))
    due = []
    for step in range(1, 501):
        now[0] += 5.0 if step == 1 else 0.01
        if moments.is_one(step):
            due.append(step)
    assert due == heard == [1, 2, 10, 74, 174, 274, 374, 474]


def test_the_dead_feature_term_is_part_of_that_comparison(records):
    curve = records[0]["dead features"].curve
    assert max(row.metrics["auxiliary_loss"] for row in curve) > 0


def test_a_moving_alpha_is_part_of_that_comparison(records):
    curve = records[0]["dynamic"].curve
    assert len({row.metrics["alpha"] for row in curve}) == STEPS // 4


@every_case
def test_penalties_and_states_that_move_are_part_of_that_comparison(case: str, records):
    states = records[0][case].states
    for key in states[0].keys() - {"observations"}:
        # Shares of the tokens, and the L0 of topk, may well stay; the rest of a state moves.
        if key not in ("task_share", "l0"):
            assert any(not torch.equal(state[key], states[0][key]) for state in states), key
    penalised = CASES[case].get("regularizer", "none") != "none"
    assert all((row.metrics["penalty"] > 0) == penalised for row in records[0][case].curve)
