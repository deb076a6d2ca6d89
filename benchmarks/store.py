"""The activation store: start from the cache, memory of workers, delivery, harvest, several nodes.

    python benchmarks/store.py [--mib 1024] [--parts start,memory,delivery,harvest,step,nodes,gpu]

`gpu` is store_gpu.py, which can be run alone where there is a GPU and no Ray; not run by default.

What is compared runs in turns in one process, so that other work on the machine slows both sides.
Activations are synthetic but in `harvest` and `step`; their first column is the row's number, from
which the mixing of delivered batches is measured.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import ray

from raysae.search.cluster import WORKER_ENVIRONMENT
from raysae.store.cache import Entry, activations_key
from raysae.store.chunks import Chunk, Moments, Piece, add_up
from raysae.store.entries import save_chunk
from raysae.store.handle import HeldChunk, StoreHandle
from raysae.store.harvest import harvest
from raysae.worlds.world import load_world

MIB = 1 << 20
HOOK = "blocks.0.hook_resid_post"
QUIET = {
    "address": "local",
    "include_dashboard": False,
    "log_to_driver": False,
    "logging_level": "ERROR",
}


def chunks_of(mib: int, width: int, chunk_mib: int = 16) -> Iterator[np.ndarray]:
    """float32 (rows, width), chunk by chunk; column 0 is the row's number over all chunks."""
    rows = chunk_mib * MIB // (4 * width)
    rng = np.random.default_rng(0)
    for start in range(0, mib // chunk_mib * rows, rows):
        chunk = rng.standard_normal((rows, width), dtype=np.float32)
        chunk[:, 0] = np.arange(start, start + rows)
        yield chunk


def put_store(mib: int, width: int) -> StoreHandle:
    """A store of synthetic chunks in the object store."""
    held, moments = [], []
    for chunk in chunks_of(mib, width):
        rows = len(chunk)
        origin = ray.put(np.zeros((2, rows), np.int32))
        held.append(HeldChunk(ray.put(chunk), origin, ""))
        moments.append(Moments(rows, chunk.sum(0, np.float64), rows * width**0.5, rows * width))
    total = add_up(["forget"] * len(moments), moments)
    rows = int(total["all"].rows)
    return StoreHandle(tuple(held), np.ones(rows, bool), total, None, mib * MIB)


# ---- start from the cache


def measure_start(mib: int) -> None:
    """Write a store to a cache, and start from it: what `harvest` does in a second search."""
    world = load_world("embedded")
    with tempfile.TemporaryDirectory() as folder:
        entry = Entry.at(Path(folder), "activations", activations_key(world, HOOK, "float32"))
        records, first = [], 0
        started = time.perf_counter()
        for acts in chunks_of(mib, 128):
            rows = len(acts)
            piece = Piece("forget" if not records else "retain", first, first + rows // 64)
            first = piece.stop
            origin = np.zeros(rows, np.int32)
            moments = Moments(rows, acts.sum(0, np.float64), rows * 11.3, rows * 128.0)
            chunk = Chunk(acts, origin, origin, moments)
            records.append(save_chunk(entry, piece, chunk, "float32"))
        entry.publish(records, {})
        write = time.perf_counter() - started
        print(f"written to the cache, with fsync and making the numbers: {write:.1f} s")
        for name, prepare in (("not in memory", _forget_files), ("in memory", lambda _: None)):
            prepare(entry.folder)
            ray.init(num_cpus=2, object_store_memory=2 * mib * MIB, **QUIET)
            started = time.perf_counter()
            found = harvest("embedded", [HOOK], "float32", evaluation_cache=False,
                            cache=Path(folder))  # fmt: skip
            seconds = time.perf_counter() - started
            assert "from the cache" in found.lines[-1], found.lines
            ray.shutdown()
            print(f"start from the cache, files {name}: {seconds:.2f} s, "
                  f"{seconds * 1024 / mib:.2f} s per GiB (goal 5)")  # fmt: skip


def _forget_files(folder: Path) -> None:
    """Ask the kernel to drop these files from its page cache."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


# ---- memory of workers


@ray.remote(num_cpus=0.5)
class Reader:
    """A worker with its imports behind it."""

    def __init__(self) -> None:
        import torch

        from raysae.store import batches  # noqa: F401

        torch.set_num_threads(1)
        self._used = float(torch.randn(512, 512).matmul(torch.randn(512, 512)).sum())

    def private_mib(self) -> float:
        """Unique set size of this process."""
        return psutil.Process().memory_full_info().uss / MIB

    def read(self, handles: list[Any], batches: int) -> int:
        """Open the store and take batches; rows read."""
        source = ray.get(handles[0]).open()
        return sum(len(source.batch(0, step, 4096)[0]) for step in range(batches))


def measure_memory(mib: int) -> None:
    """Private memory of 1, 2 and 4 workers that read the whole store, above that of their start."""
    ray.init(num_cpus=2, object_store_memory=int(1.5 * mib) * MIB, **QUIET)
    store = ray.put(put_store(mib, 256))
    batches = mib * MIB // (4096 * 256 * 4)
    for workers in (1, 2, 4):
        readers = [Reader.remote() for _ in range(workers)]
        before = ray.get([reader.private_mib.remote() for reader in readers])
        ray.get([reader.read.remote([store], batches) for reader in readers])
        after = ray.get([reader.private_mib.remote() for reader in readers])
        grown = [b - a for a, b in zip(before, after, strict=True)]
        print(f"{workers} workers, an epoch of {mib} MiB each: private memory grew by "
              f"{', '.join(f'{g:.0f}' for g in grown)} MiB (goal 50)")  # fmt: skip
        for reader in readers:
            ray.kill(reader)
    ray.shutdown()


# ---- delivery of batches


def measure_delivery(mib: int, width: int, batch_size: int = 4096, rounds: int = 3) -> None:
    """Milliseconds a batch, whole epochs, in turns; and how related neighbours in a batch are."""
    import torch
    from sae_lens.training.mixing_buffer import mixing_buffer

    torch.set_num_threads(1)
    ray.init(num_cpus=2, object_store_memory=int(2.5 * mib) * MIB, **QUIET)
    ray.data.DataContext.get_current().enable_progress_bars = False
    store = put_store(mib, width)
    source, arrays = store.open(), store.arrays()
    whole = np.concatenate(arrays)
    n_batches = store.rows // batch_size
    window = max(store.rows // 4, 2 * batch_size)

    def ours(epoch: int) -> Iterator[Any]:
        for step in range(epoch * n_batches, (epoch + 1) * n_batches):
            yield source.batch(0, step, batch_size)[0]

    def plain(epoch: int) -> Iterator[Any]:
        order = np.random.default_rng(epoch).permutation(store.rows)
        for i in range(n_batches):
            yield torch.from_numpy(whole[order[i * batch_size : (i + 1) * batch_size]])

    def sae_lens(_: int) -> Iterator[Any]:
        yield from mixing_buffer(window, batch_size, (torch.tensor(array) for array in arrays))

    def ray_data(epoch: int) -> Iterator[Any]:
        refs = [chunk.place for chunk in store.chunks]
        batches = ray.data.from_numpy_refs(refs).iter_torch_batches(
            batch_size=batch_size,
            local_shuffle_buffer_size=window,
            local_shuffle_seed=epoch,
            drop_last=True,
        )
        for batch in batches:
            yield batch["data"]

    sides: dict[str, Callable[[int], Iterator[Any]]] = {
        "store": ours,
        "permutation in process": plain,
        "SAELens' mixing buffer": sae_lens,
        "Ray Data's local shuffle": ray_data,
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    related = {}
    for epoch in range(rounds):
        for name, side in sides.items():
            started, count, numbers = time.perf_counter(), 0, []
            for batch in side(epoch):
                count += 1
                numbers.append(batch[:, 0].numpy().copy())
            seconds[name].append((time.perf_counter() - started) / count)
            pairs = [np.stack([b[:-1], b[1:]]) for b in numbers]
            related[name] = float(np.corrcoef(np.concatenate(pairs, axis=1))[0, 1])
    print(f"{batch_size} x {width} float32, {mib} MiB, window of the buffers {window} rows")
    for name, values in seconds.items():
        print(f"  {name:<26} {1000 * median(values):8.2f} ms a batch "
              f"({min(values) * 1000:.2f} to {max(values) * 1000:.2f}), "
              f"correlation of neighbours {related[name]:+.3f}")  # fmt: skip
    ray.shutdown()


# ---- harvest and training step


def measure_harvest(rounds: int = 5) -> None:
    """Harvest of the embedded world's forget corpus against a bare forward loop, CPU time."""
    import torch

    from raysae.store.activations import SEQUENCES_PER_FORWARD, corpus_tokens, harvest_chunks
    from raysae.worlds.model import load_model

    torch.set_num_threads(1)
    world = load_world("embedded")
    model = load_model(world)
    tokens = corpus_tokens(world, model.tokenizer)["forget"][:512]

    @torch.no_grad()
    def bare(layer: int) -> None:
        for batch in torch.from_numpy(tokens).split(SEQUENCES_PER_FORWARD):
            model(batch, stop_at_layer=layer + 1, return_type=None)

    for layer in (0, 2):
        hook = f"blocks.{layer}.hook_resid_post"
        sides = {
            "bare": lambda layer=layer: bare(layer),
            "harvest": lambda hook=hook: harvest_chunks(model, tokens, [hook], "float32"),
        }
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds + 1):
            for name, side in sides.items():
                # One thread that only computes: its own time leaves out that of other work.
                started = time.process_time()
                side()
                seconds[name].append(time.process_time() - started)
        bare_s, harvest_s = (median(seconds[name][1:]) for name in ("bare", "harvest"))
        print(f"{hook}: {tokens.size / harvest_s:,.0f} tokens a CPU second, bare forward loop "
              f"{tokens.size / bare_s:,.0f}: {bare_s / harvest_s:.0%} (goal 90%)")  # fmt: skip


class Timed:
    """A source of batches that adds up how long they take; all else is the source's."""

    def __init__(self, source: Any) -> None:
        self._source, self.seconds = source, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def batch(self, *arguments: Any) -> Any:
        """As the source's."""
        return self._timed(self._source.batch, arguments)

    def batches(self, *arguments: Any) -> Any:
        """As the source's."""
        return self._timed(self._source.batches, arguments)

    def _timed(self, make: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        started = time.perf_counter()
        made = make(*arguments)
        self.seconds += time.perf_counter() - started
        return made


def measure_step(rounds: int = 200, seeds: int = 3) -> None:
    """Share of delivery in the steps that trials of the default search take: a pack of a trial's
    seeds, each with its own order of batches, on shared chunks; by regularizer.
    """
    import torch

    from raysae.regularizers import REGISTRY
    from raysae.training.pack import Pack
    from raysae.training.run import SAERun
    from raysae.training.spec import TrialSpec

    torch.set_num_threads(1)
    ray.init(num_cpus=2, object_store_memory=300 * MIB, **QUIET)
    store = harvest("embedded", [HOOK], "float32", evaluation_cache=False).stores[HOOK]
    print(f"{seeds} batches of 1024 x 128 and the step of {seeds} SAEs with them, ms")
    shares = []
    for name, method in REGISTRY.items():
        source = Timed(store.open())
        spec = TrialSpec(
            number=0,
            seed=0,
            seeds=seeds,
            sae={"architecture": "topk", "d_sae": 512, "k": 8},
            training={"tokens": rounds * 1024},
            regularizer=method(**period_of(method)),
            alpha=1.0 if method.uses_alpha else 0.0,
            rungs=(rounds * 1024,),
        )
        pack = Pack([SAERun(member, source) for member in spec.members()])
        orders = {run.spec.batches for run in pack.runs}
        assert len(orders) == seeds, f"{seeds} SAEs share {len(orders)} orders of batches"
        delivery, step = [], []
        for _ in range(rounds):
            waited, started = source.seconds, time.perf_counter()
            pack.advance()
            step.append(time.perf_counter() - started)
            delivery.append(source.seconds - waited)
        shares.append(median(delivery) / median(step))
        print(f"  {name:<24} {1000 * median(delivery):5.2f} of {1000 * median(step):6.2f}: "
              f"{shares[-1]:.1%}", flush=True)  # fmt: skip
    print(f"mean of the shares {sum(shares) / len(shares):.1%} (goal 5%)")
    ray.shutdown()


def period_of(method: Any) -> dict[str, int]:
    """A period in the middle of the default search's."""
    return {"group_update_period": 50} if "group_update_period" in method.model_fields else {}


# ---- several nodes


@ray.remote(num_cpus=0.5)
def read_all(chunks: list[Any]) -> int:
    """Bytes of all chunks, read on this task's node."""
    return sum(array.nbytes for array in ray.get(chunks))


def measure_nodes(mib: int = 64) -> None:
    """Bytes over the loopback device while two workers on each of two other nodes read all."""
    from ray.cluster_utils import Cluster
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    others = [cluster.add_node(num_cpus=1, object_store_memory=300 * MIB) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    cluster.wait_for_nodes()
    chunks = [chunk.place for chunk in put_store(mib, 256).chunks]
    on_node = [
        read_all.options(scheduling_strategy=NodeAffinitySchedulingStrategy(n.node_id, soft=False))
        for n in others
    ]
    ray.get([task.remote([]) for task in on_node for _ in range(2)])
    for which in ("first", "second"):
        before = psutil.net_io_counters(pernic=True)["lo"].bytes_recv
        read = ray.get([task.remote(chunks) for task in on_node for _ in range(2)])
        crossed = (psutil.net_io_counters(pernic=True)["lo"].bytes_recv - before) / MIB
        print(f"{which} reading: 4 workers on 2 other nodes read {sum(read) / MIB:.0f} MiB, "
              f"{crossed:.0f} MiB crossed: {crossed / mib:.2f} times the store")  # fmt: skip
    ray.shutdown()
    cluster.shutdown()


# ---- on a GPU


def measure_on_gpu(mib: int) -> None:
    """Placement, delivery and sharing, see store_gpu.py."""
    import torch
    from store_gpu import measure

    if not torch.cuda.is_available():
        sys.exit("gpu: no CUDA device here")
    measure(mib, ["placement", "delivery", "sharing"], torch.device("cuda:0"))


def main() -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--delivery-mib", type=int, default=256)
    parser.add_argument("--parts", default="start,memory,delivery,harvest,step,nodes")
    arguments = parser.parse_args()
    wanted = WORKER_ENVIRONMENT | {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "HF_HUB_OFFLINE": "1"}
    if not wanted.items() <= os.environ.items():  # glibc reads it when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | wanted)
    print(f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores; ray {version('ray')}, "
          f"torch {version('torch')}, sae-lens {version('sae-lens')}; load "
          f"{os.getloadavg()[0]:.1f}")  # fmt: skip
    parts: dict[str, Callable[[], None]] = {
        "start": lambda: measure_start(arguments.mib),
        "memory": lambda: measure_memory(arguments.mib),
        "delivery": lambda: [measure_delivery(arguments.delivery_mib, w) for w in (256, 2304)],
        "harvest": measure_harvest,
        "step": measure_step,
        "nodes": measure_nodes,
        "gpu": lambda: measure_on_gpu(arguments.mib),
    }
    for name in arguments.parts.split(","):
        print(f"-- {name}", flush=True)
        parts[name]()


if __name__ == "__main__":
    main()
