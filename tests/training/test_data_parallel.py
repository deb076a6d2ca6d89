"""Two processes that share a trial hold the same SAE at every step, and learn what one would.

The processes come from a fork server that has imported what they need: a quarter of a minute once,
instead of once a process.
"""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from raysae.store.batches import ChunkedActivations
from raysae.training.collective import Alone, Group
from raysae.training.loop import Progress, Rung, TrialRun
from raysae.training.spec import TrialSpec
from raysae.unlearning import UnlearningResult, UnlearningStatus
from raysae.unlearning.result import refused

STEPS, PROCESSES = 20, 2
CASES = {
    "standard": {"architecture": "standard"},
    "topk": {"architecture": "topk"},
    "dead features": {"architecture": "topk", "sparsity": 1.0, "batch_size": 8, "dead_after": 2},
    "fixed_orthogonal": {"architecture": "standard", "regularizer": "fixed_orthogonal"},
    "adaptive_orthogonal": {
        "architecture": "topk",
        "regularizer": "adaptive_orthogonal",
        "parameters": {"group_update_period": 4},
    },
    "grouped": {
        "architecture": "topk",
        "regularizer": "grouped",
        "parameters": {"group_update_period": 4, "n_groups": 4},
    },
}


@dataclass
class Record:
    """What one process saw of a trial."""

    decoders: list[Tensor]  # after every step
    states: list[dict[str, Tensor]]  # of the regularizer, after every step
    curve: list[Progress]
    rungs: list[tuple[int, Tensor, Tensor]]  # step and firing rates
    stopped_at: int  # when the listener says no at step 5


def score(*_: Any) -> UnlearningResult:
    return refused("cached", UnlearningStatus.untrained, "not scored here")


def observe(spec: TrialSpec, store: ChunkedActivations, collective: Alone) -> Record:
    run = TrialRun(spec, store, collective=collective)
    record = Record([], [], [], [], 0)
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

    TrialRun(spec, store, collective=collective).train(score, listen)
    stopping = TrialRun(spec, store, collective=collective)
    stopping.train(score, lambda event: event.step < 5)
    record.stopped_at = stopping.step
    return record


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
def records(folder: Path, make_spec, make_store) -> tuple[list[dict], dict[str, TrialSpec]]:
    """Both processes' records by case, and the specs; made once."""
    specs = {name: make_spec(steps=STEPS, lr=5e-3, **case) for name, case in CASES.items()}
    if not (folder / "0").exists():
        forkserver.set_forkserver_preload(["raysae.training.loop", "sklearn.cluster"])
        arguments = (folder, specs, make_store())
        mp.start_processes(one_of_two, arguments, nprocs=PROCESSES, start_method="forkserver")
    load = [torch.load(folder / f"{rank}", weights_only=False) for rank in range(PROCESSES)]
    return load, specs


every_case = pytest.mark.parametrize("case", CASES)


@every_case
def test_both_processes_hold_the_same_sae_and_groups_at_every_step(case: str, records):
    first, second = (record[case] for record in records[0])
    assert len(first.decoders) == STEPS
    for a, b in zip(first.decoders, second.decoders, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(first.states, second.states, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


@every_case
def test_two_processes_learn_what_one_learns(case: str, records, make_store):
    loaded, specs = records
    two, one = loaded[0][case], observe(specs[case], make_store(), Alone())
    for a, b in zip(two.decoders, one.decoders, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    for a, b in zip(two.states, one.states, strict=True):
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-5)


@every_case
def test_the_curve_is_that_of_one_process(case: str, records, make_store):
    loaded, specs = records
    two, one = loaded[0][case].curve, observe(specs[case], make_store(), Alone()).curve
    assert [row.step for row in two] == [row.step for row in one] == list(range(1, STEPS + 1))
    for a, b in zip(two, one, strict=True):
        assert a.tokens == b.tokens
        assert a.metrics == pytest.approx(b.metrics, rel=1e-4, abs=1e-6)


@every_case
def test_firing_rates_count_the_tokens_of_both_processes(case: str, records, make_store):
    loaded, specs = records
    two, one = loaded[0][case].rungs, observe(specs[case], make_store(), Alone()).rungs
    for (step, *rates), (wanted_step, *wanted) in zip(two, one, strict=True):
        assert step == wanted_step == STEPS
        torch.testing.assert_close(rates, wanted, rtol=0, atol=1e-4)


def test_only_the_first_process_talks_and_its_word_ends_the_trial_for_both(records):
    for case in CASES:
        first, second = (record[case] for record in records[0])
        assert len(first.curve) == STEPS
        assert second.curve == second.rungs == []
        assert first.stopped_at == second.stopped_at == 5


def test_the_dead_feature_term_is_part_of_that_comparison(records):
    curve = records[0][0]["dead features"].curve
    assert max(row.metrics["auxiliary_loss"] for row in curve) > 0
