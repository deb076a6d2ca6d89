"""Of two processes that train a trial together one is killed: no failure of the trial."""

from __future__ import annotations

import os
import signal
import traceback
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from worker_bench import FakeArtifacts, FakeBroker, FakeEvaluator, make_worker

from raysae.pool import worker as module
from raysae.pool.folder import trial_folder
from raysae.store.batches import ChunkedActivations
from raysae.training.checkpoint import CHECKPOINT_FILE
from raysae.training.collective import Group
from raysae.training.spec import TrialSpec

DIES_AT = 12
"""Batches that the process has had, of one a step."""


def one_of_two(
    rank: int, folder: Path, spec: TrialSpec, parts: tuple[Any, ...], dies: int | None
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    module.ray.get = lambda answers: answers
    module.Artifacts = FakeArtifacts
    delivered: list[int] = []
    chunks, is_forget, mean = parts
    store = ChunkedActivations(chunks, is_forget, scale=1.0, mean=mean, variance=1.0)
    take = store.batch

    def batch(*args: Any) -> Any:
        delivered.append(1)
        if rank == dies and len(delivered) == DIES_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        return take(*args)

    store.batch = batch
    broker = FakeBroker(lambda *_: "go")
    group = Group(dist.new_group([0, 1]))
    worker = make_worker(folder / "run", store, broker, FakeEvaluator, group, checkpoint_seconds=0)
    raised = ""
    try:
        worker._run([spec])
    except Exception as error:
        raised = "".join(traceback.format_exception_only(error))
    noted = (raised, broker.failed, broker.halted, [row["step"] for row in broker.rows[0]])
    torch.save(noted, folder / f"{rank}")


@pytest.mark.parametrize("dies", [0, 1, None])
def test_who_is_left_begins_again_and_fails_no_trial(
    dies: int | None, tmp_path: Path, make_spec, make_store, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    forkserver.set_forkserver_preload(["raysae.pool.worker"])
    spec, store = make_spec("topk", step="saelens"), make_store()
    parts = store._chunks, store._is_forget, store.mean.numpy()
    arguments = (tmp_path, spec, parts, dies)
    context = mp.start_processes(
        one_of_two, arguments, nprocs=2, start_method="forkserver", join=False
    )
    assert context is not None
    for process in context.processes:
        process.join(300)
    codes = [process.exitcode for process in context.processes]
    assert codes == [-signal.SIGKILL if rank == dies else 0 for rank in range(2)]
    checkpoint = trial_folder(tmp_path / "run", 0) / CHECKPOINT_FILE
    for rank in {0, 1} - {dies}:
        raised, failed, halted, steps = torch.load(tmp_path / f"{rank}")
        assert (failed, halted) == ({}, "")
        assert raised.startswith("raysae.training.collective.LostPeerError") == (dies is not None)
        wanted = DIES_AT - 1 if dies is not None else spec.training.steps
        assert steps == ([] if rank else list(np.arange(1, wanted + 1)))
    assert checkpoint.exists() == (dies is not None)
