"""The activation store on a GPU: placing a copy, batches from it, and one copy for 1, 2, 4 workers.

    python benchmarks/store_gpu.py [--mib 1024] [--parts placement,delivery,step,sharing]
        [--d-sae 16384]

`delivery` waits for each batch; `step` is what batches cost where they are used: steps of a pack
with batches from the copy and with one batch that stands ready, in turns, waited for at the end of
a turn only. All parts but sharing need no Ray; sharing is left out, and says so, where Ray is not
installed.
`--device cpu` tries the script where there is no GPU; its figures are then of no GPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from statistics import median
from typing import Any

import numpy as np
import torch

from raysae.store.batches import ChunkedActivations, ResidentRows, copy_to
from raysae.store.chunks import Moments, add_up
from raysae.store.files import checksum
from raysae.training.pack import Pack
from raysae.training.run import SAERun
from raysae.training.spec import TrainingSpec, TrialSpec

MIB = 1 << 20
BATCH = 4096
SECONDS = 90
"""For anything that a worker is asked."""


def chunks_of(
    mib: int, width: int, dtype: str = "float32", chunk_mib: int = 16
) -> list[np.ndarray]:
    """Random chunks (rows, width), float32 or int16 that holds bfloat16."""
    rng, chunk_mib = np.random.default_rng(0), 16
    size = 4 if dtype == "float32" else 2
    rows = chunk_mib * MIB // (size * width)
    made = []
    for _ in range(max(1, mib // chunk_mib)):
        chunk = rng.standard_normal((rows, width), dtype=np.float32)
        if dtype == "bfloat16":
            chunk = torch.from_numpy(chunk).bfloat16().view(torch.int16).numpy()
        chunk.setflags(write=False)
        made.append(chunk)
    return made


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Until the device has done it."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_placement(mib: int, device: torch.device, rounds: int = 3) -> None:
    """Seconds per GiB to place a copy, and to compute its checksums, in float32 and bfloat16."""
    for dtype in ("float32", "bfloat16"):
        chunks = chunks_of(mib, 256, dtype)
        gib = sum(chunk.nbytes for chunk in chunks) / 2**30
        copy_to(device, chunks[:1])
        placed = [seconds_of(lambda c=chunks: copy_to(device, c), device) for _ in range(rounds)]
        rows = ResidentRows(copy_to(device, chunks), [len(chunk) for chunk in chunks])
        looked = seconds_of(rows.checksums, device)
        assert rows.checksums() == [checksum(chunk) for chunk in chunks], "not what was placed"
        print(f"{dtype:<9} {gib * 1024:.0f} MiB: placed in {median(placed) / gib:.2f} s per GiB "
              f"({min(placed) / gib:.2f} to {max(placed) / gib:.2f}), checksums of the copy "
              f"{looked / gib:.2f} s per GiB")  # fmt: skip


def one_of(source: ChunkedActivations, step: int) -> Any:
    """A batch."""
    return source.batch(0, step, BATCH)


def take(side: Callable[[int], Any], first: int, count: int) -> None:
    """So many batches."""
    for step in range(first, first + count):
        side(step)


def measure_delivery(mib: int, device: torch.device, steps: int = 100, rounds: int = 5) -> None:
    """Milliseconds a batch, in turns: from the copy, from host memory, and torch's index_select."""
    for width, dtype in ((256, "float32"), (2304, "float32"), (2304, "bfloat16")):
        chunks = chunks_of(mib, width, dtype)
        n_rows = sum(map(len, chunks))
        units: dict[str, Any] = {"scale": 0.5, "mean": np.zeros(width), "variance": 1.0}
        labels = np.zeros(n_rows, bool)
        resident = ChunkedActivations(chunks, labels, **units, device=str(device), resident=True)
        ahead = ChunkedActivations(chunks, labels, **units, device=str(device), prefetch=True)
        whole = copy_to(device, chunks)
        order = torch.randperm(n_rows, device=device)

        def plain(step: int, whole: torch.Tensor = whole, order: torch.Tensor = order) -> Any:
            start = step * BATCH % (len(order) - BATCH)
            return whole.index_select(0, order[start : start + BATCH]).float()

        sides = {
            "resident on the device": partial(one_of, resident),
            "host memory, a step ahead": partial(one_of, ahead),
            "plain torch.index_select": plain,
        }
        for step in (0, 1, 2):
            ours, theirs = resident.batch(0, step, BATCH), ahead.batch(0, step, BATCH)
            assert torch.equal(ours[0], theirs[0]), "the tiers differ"
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(rounds + 1):
            for name, side in sides.items():
                few = steps if name != "host memory, a step ahead" else max(1, steps // 5)
                work = partial(take, side, turn * few, few)
                seconds[name].append(seconds_of(work, device) / few)
        print(f"{BATCH} x {width} {dtype}, {mib} MiB")
        for name, values in seconds.items():
            kept = values[1:]
            print(f"  {name:<26} {1000 * median(kept):8.3f} ms a batch "
                  f"({min(kept) * 1000:.3f} to {max(kept) * 1000:.3f})")  # fmt: skip


class Standing:
    """One batch of a source, ready for every step."""

    def __init__(self, source: ChunkedActivations) -> None:
        self.d_in, self.scale, self.mean, self.variance = (
            source.d_in,
            source.scale,
            source.mean,
            source.variance,
        )
        self._made = source.batch(0, 0, BATCH)

    def batch(self, *_: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._made

    def batches(self, seeds: Sequence[int], *_: int) -> tuple[torch.Tensor, torch.Tensor]:
        acts, labels = self._made
        return acts.expand(len(seeds), -1, -1), labels.expand(len(seeds), -1)

    def with_forget_share(self, forget_share: float) -> Standing:
        raise ValueError("the benchmark's batches have a share of their own")

    def done_with(self, seeds: Collection[int]) -> None:
        pass


def measure_step(
    mib: int, device: torch.device, d_sae: int, width: int = 2304, rounds: int = 5
) -> None:
    """Share of delivery in a training step, for one SAE and for three with orders of their own."""
    chunks = chunks_of(mib, width)
    labels = np.arange(sum(map(len, chunks))) % 2 == 0
    units: dict[str, Any] = {"scale": 1.0, "mean": np.zeros(width), "variance": float(width)}
    resident = ChunkedActivations(chunks, labels, **units, device=str(device), resident=True)
    steps = 40 if device.type == "cuda" else 2
    for seeds in (1, 3):
        packs = {}
        for name, source in (("standing", Standing(resident)), ("delivered", resident)):
            spec = TrialSpec(
                number=0,
                seed=0,
                seeds=seeds,
                sae={"architecture": "standard", "d_sae": d_sae, "l1_coefficient": 5.0},
                training=TrainingSpec(
                    tokens=10**6 * BATCH, batch_size=BATCH, autocast="bfloat16", tf32=True
                ),
                regularizer={"name": "none"},
                rungs=(10**6 * BATCH,),
            )
            packs[name] = Pack([SAERun(member, source) for member in spec.members()])
        seconds: dict[str, list[float]] = {name: [] for name in packs}
        for _ in range(rounds + 1):  # the first of them records the step
            for name, pack in packs.items():
                work = partial(advance, pack, steps)
                seconds[name].append(seconds_of(work, device) / steps)
        standing, delivered = (median(times[1:]) for times in seconds.values())
        least, most = (1000 * f(seconds["delivered"][1:]) for f in (min, max))
        print(f"{seeds} SAEs, {width} to {d_sae}, {BATCH} rows each: {1000 * standing:.3f} ms a "
              f"step with a standing batch, {1000 * delivered:.3f} ({least:.3f} to {most:.3f}) "
              f"with batches from the copy: {1 - standing / delivered:.1%} of it",
              flush=True)  # fmt: skip


def advance(pack: Pack, steps: int) -> None:
    """So many steps."""
    for _ in range(steps):
        pack.advance()


def measure_sharing(mib: int) -> None:
    """Memory of the GPU that 1, 2 and 4 workers' activations take, shared and each for itself."""
    if find_spec("ray") is None:
        print("left out: Ray is not installed here")
        return
    import ray

    from raysae.store.handle import HeldChunk, Sharing, StoreHandle

    ray.init(
        address="local",
        num_cpus=8,
        num_gpus=1,
        object_store_memory=2 * mib * MIB,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    held, moments = [], []
    for chunk in chunks_of(mib, 256):
        origin = ray.put(np.zeros((2, len(chunk)), np.int32))
        held.append(HeldChunk(ray.put(chunk), origin, checksum(chunk)))
        moments.append(Moments(len(chunk), chunk.sum(0, np.float64), 1.0, 1.0))
    total = add_up(["forget"] * len(moments), moments)
    n_rows = int(total["all"].rows)
    store = ray.put(StoreHandle(tuple(held), np.ones(n_rows, bool), total, None, mib * MIB))

    @ray.remote(num_cpus=1, num_gpus=0.25)
    class Worker:
        def warm_up(self) -> None:
            rows = np.zeros((8192, 256), np.float32)
            units: dict[str, Any] = {"scale": 1.0, "mean": np.zeros(256), "variance": 1.0}
            source = ChunkedActivations(
                [rows], np.zeros(8192, bool), **units, device="cuda:0", resident=True
            )
            source.batch(0, 0, BATCH)
            torch.cuda.synchronize()

        def used(self) -> int:
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info()
            return total - free

        def open(self, handles: list[Any], sharing: Sharing | None) -> tuple[float, str]:
            handle = ray.get(handles[0])
            started = time.perf_counter()
            self._source = handle.open("cuda:0", sharing)
            torch.cuda.synchronize()
            return time.perf_counter() - started, self._source.where

        def batches(self, steps: int) -> float:
            """Milliseconds a batch, while the others take theirs."""
            started = time.perf_counter()
            for step in range(steps):
                self._source.batch(0, step, BATCH)
            torch.cuda.synchronize()
            return 1000 * (time.perf_counter() - started) / steps

    for count in (1, 2, 4):
        for shared in (True, False):
            workers = [Worker.remote() for _ in range(count)]
            ray.get([worker.warm_up.remote() for worker in workers], timeout=SECONDS)
            before = ray.get(workers[0].used.remote(), timeout=SECONDS)
            sharing = Sharing(f"{count} workers", count) if shared else None
            opened = ray.get([w.open.remote([store], sharing) for w in workers], timeout=SECONDS)
            grown = ray.get(workers[0].used.remote(), timeout=SECONDS) - before
            milliseconds = ray.get([w.batches.remote(100) for w in workers], timeout=SECONDS)
            who = "one copy  " if shared else "own copies"
            print(f"{count} workers, {who}: {grown / MIB:.0f} MiB of the GPU for {mib} MiB of "
                  f"activations ({grown / (mib * MIB):.2f} copies), ready after at most "
                  f"{max(seconds for seconds, _ in opened):.2f} s, "
                  f"{max(milliseconds):.3f} ms a batch; {opened[0][1]}", flush=True)  # fmt: skip
            for worker in workers:
                ray.kill(worker)
            time.sleep(2)  # until the driver has their memory back
    ray.shutdown()


def measure(mib: int, parts: list[str], device: torch.device, d_sae: int) -> None:
    """Those parts, with the machine's name."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    print(f"{name}; torch {version('torch')}, CUDA {torch.version.cuda}", flush=True)
    known: dict[str, Callable[[], None]] = {
        "placement": lambda: measure_placement(mib, device),
        "delivery": lambda: measure_delivery(mib, device),
        "step": lambda: measure_step(mib, device, d_sae),
        "sharing": lambda: measure_sharing(mib),
    }
    for part in parts:
        print(f"-- {part}", flush=True)
        known[part]()


def main() -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--parts", default="placement,delivery,step,sharing")
    parser.add_argument("--d-sae", type=int, default=16384, help="of the SAEs in `step`")
    parser.add_argument("--device", default="cuda:0")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.mib < 64:
        parser.error("--mib: at least 64, or there are fewer rows than in a batch")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here")
    measure(arguments.mib, arguments.parts.split(","), device, arguments.d_sae)


if __name__ == "__main__":
    main()
