"""Two of Ray's workers with one copy between them, in host memory in place of a GPU's."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from synthetic_store import put_store

from raysae.store import batches
from raysae.store import handle as module
from raysae.store.handle import CorruptCopyError, Sharing
from raysae.store.one_copy import LostCopyError

pytestmark = pytest.mark.ray
STEPS = 20
SHARING = Sharing("test", 2)
SECONDS = 90


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=800 << 20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()


@ray.remote(num_cpus=0.5)
class Worker:
    """Opens the store and takes batches."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        torch.multiprocessing.set_sharing_strategy("file_system")

    def open(self, handles: list[ray.ObjectRef], group: str) -> tuple[str, int]:
        """Where batches come from, and the process."""
        store = ray.get(handles[0])
        store.open().batch(0, 0, 4096)
        self._before = psutil.Process().memory_full_info().uss
        self._source = store.open("cpu", Sharing(group, 2))
        return self._source.where, os.getpid()

    def grown(self) -> float:
        """By how many bytes the memory that is this process's alone has grown since it opened."""
        return psutil.Process().memory_full_info().uss - self._before

    def batches(self, first: int = 0) -> list[np.ndarray]:
        return [self._source.batch(3, first + step, 500)[0].numpy() for step in range(STEPS)]

    def checksums(self) -> list[str]:
        return self._source.checksums()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_workers_read_one_copy_and_the_second_cannot_go_on_without_the_first(dtype: str):
    # Of 128 MiB: workers grow by 10 to 40 beside it, and by 65 once, it is not known by what.
    store = put_store(dtype, chunks=8 if dtype == "float32" else 16)
    handles = [ray.put(store)]
    workers = [Worker.remote() for _ in range(2)]
    opened = [ray.get(w.open.remote(handles, dtype), timeout=SECONDS) for w in workers]
    (where,) = {where for where, _ in opened}
    assert where.startswith("one copy on cpu for up to 2 workers (")

    in_host_memory = store.open()
    wanted = [in_host_memory.batch(3, step, 500)[0].numpy() for step in range(STEPS)]
    for worker in workers:
        np.testing.assert_array_equal(ray.get(worker.batches.remote(), timeout=SECONDS), wanted)
    sums = [chunk.sha256 for chunk in store.chunks]
    assert ray.get([w.checksums.remote() for w in workers], timeout=SECONDS) == [sums, sums]
    # Neither has the copy for itself: shared memory is no process's own.
    grown = ray.get([w.grown.remote() for w in workers], timeout=SECONDS)
    assert max(grown) < 0.9 * store.nbytes

    os.kill(opened[0][1], signal.SIGKILL)
    with pytest.raises(LostCopyError, match=f"process {opened[0][1]}, which held"):
        for _ in range(1000):  # until it has ended
            ray.get(workers[1].batches.remote(), timeout=SECONDS)
    # Started again, as Ray Train does with both, they have one again.
    workers = [Worker.remote() for _ in range(2)]
    again = [ray.get(w.open.remote(handles, f"{dtype} again"), timeout=SECONDS) for w in workers]
    assert again[0][0] == again[1][0]
    np.testing.assert_array_equal(ray.get(workers[1].batches.remote(), timeout=SECONDS), wanted)


def test_a_copy_with_other_bytes_is_refused(monkeypatch: pytest.MonkeyPatch):
    store = put_store("float32")
    monkeypatch.setattr(module, "_free_bytes", lambda _: 1 << 40)
    copy_to = batches.copy_to

    def damaged(*args: Any) -> Any:
        rows = copy_to(*args)
        rows[3, 1] += 1
        return rows

    monkeypatch.setattr(batches, "copy_to", damaged)
    with pytest.raises(CorruptCopyError, match="other checksums than the store"):
        store.open("cpu", SHARING)


def test_without_room_every_worker_reads_from_host_memory(monkeypatch: pytest.MonkeyPatch):
    store = put_store("float32")
    monkeypatch.setattr(module, "_free_bytes", lambda _: store.nbytes)
    assert store.open("cpu", SHARING).where == "shared memory"
