"""Two of Ray's workers with one copy between them, in host memory in place of a GPU's."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import numpy as np
import psutil
import pytest
import ray
import torch

from raysae.store import handle as module
from raysae.store.chunks import Moments, add_up
from raysae.store.files import checksum
from raysae.store.handle import CorruptCopyError, HeldChunk, Sharing, StoreHandle
from raysae.store.one_copy import LostCopyError

pytestmark = pytest.mark.ray
MIB = 1 << 20
WIDTH, CHUNKS, ROWS = 256, 4, 16_384
STORE_MIB = CHUNKS * ROWS * WIDTH * 4 // MIB
STEPS = 20
SHARING = Sharing("test", 2)
SECONDS = 90


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=300 * MIB,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()


def put_store(dtype: str) -> StoreHandle:
    rng, held, moments = np.random.default_rng(0), [], []
    for _ in range(CHUNKS):
        rows = rng.standard_normal((ROWS, WIDTH), dtype=np.float32)
        moments.append(Moments(ROWS, rows.sum(0, np.float64), ROWS * 16.0, ROWS * 256.0))
        if dtype == "bfloat16":
            rows = torch.from_numpy(rows).bfloat16().view(torch.int16).numpy()
        origin = ray.put(np.zeros((2, ROWS), np.int32))
        held.append(HeldChunk(ray.put(rows), origin, checksum(rows)))
    corpora = ["forget", "forget", "retain", "retain"]
    labels = np.repeat([name == "forget" for name in corpora], ROWS)
    nbytes = STORE_MIB * MIB // (1 if dtype == "float32" else 2)
    return StoreHandle(tuple(held), labels, add_up(corpora, moments), None, nbytes)


@ray.remote(num_cpus=0.5)
class Worker:
    """Opens the store and takes batches."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        torch.multiprocessing.set_sharing_strategy("file_system")

    def open(self, handles: list[ray.ObjectRef], group: str = "test") -> tuple[str, int, float]:
        """Where batches come from, the process, and by how many MiB its own memory has grown."""
        store = ray.get(handles[0])
        store.open().batch(0, 0, 4096)
        before = psutil.Process().memory_full_info().uss
        self._source = store.open("cpu", Sharing(group, 2))
        self._source.batch(0, 0, 4096)
        grown = (psutil.Process().memory_full_info().uss - before) / MIB
        return self._source.where, os.getpid(), grown

    def batches(self, first: int = 0) -> list[np.ndarray]:
        return [self._source.batch(3, first + step, 500)[0].numpy() for step in range(STEPS)]

    def checksums(self) -> list[str]:
        return self._source.checksums()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_workers_read_one_copy_and_the_second_cannot_go_on_without_the_first(dtype: str):
    store = put_store(dtype)
    handles = [ray.put(store)]
    workers = [Worker.remote() for _ in range(2)]
    opened = [ray.get(w.open.remote(handles, dtype), timeout=SECONDS) for w in workers]
    (where,) = {where for where, *_ in opened}
    assert where.startswith("one copy on cpu for up to 2 workers (")

    in_host_memory = store.open()
    wanted = [in_host_memory.batch(3, step, 500)[0].numpy() for step in range(STEPS)]
    for worker in workers:
        np.testing.assert_array_equal(ray.get(worker.batches.remote(), timeout=SECONDS), wanted)
    sums = [chunk.sha256 for chunk in store.chunks]
    assert ray.get([w.checksums.remote() for w in workers], timeout=SECONDS) == [sums, sums]
    # Neither has the copy for itself: shared memory is no process's own.
    assert max(grown for *_, grown in opened) < 0.4 * store.nbytes / MIB

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
    wrong = store.chunks[0].__class__(store.chunks[0].place, store.chunks[0].origin, "0" * 64)
    broken = StoreHandle(
        (wrong, *store.chunks[1:]), store.is_forget, store.moments, None, store.nbytes
    )
    with pytest.raises(CorruptCopyError, match="other checksums than the store"):
        broken.open("cpu", SHARING)


def test_without_room_every_worker_reads_from_host_memory(monkeypatch: pytest.MonkeyPatch):
    store = put_store("float32")
    monkeypatch.setattr(module, "_free_bytes", lambda _: store.nbytes)
    assert store.open("cpu", SHARING).where == "shared memory"
