"""What it saves to replay a pack's step as a CUDA graph: the same steps, replayed and not.

    python benchmarks/replayed_steps.py [--sizes small medium large] [--architectures topk …]
        [--members 1 16] [--dtype bfloat16|float32] [--profile]

Needs a GPU. Sizes, batches and packs are those of benchmarks/train_throughput.py, at 1024 rows a
step, 4096 at the large size. `--profile` prints the kernels that take longest in a step that is not
replayed.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from train_throughput import ARCHITECTURES, SIZES, Setting, raysae, sparse_sums

from raysae.training import pack
from raysae.training.replay import Replay

SHOWN = 16


class AsItIs:
    """In the place of `Replay`: every step is asked for kernel by kernel."""

    def __call__(
        self, kind: Any, step: Callable[..., dict[str, Tensor]], arguments: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        return step(*arguments)

    def forget(self) -> None:
        """Nothing is remembered."""


def milliseconds(step: Callable[[], object], steps: int, warm_up: int = 6) -> float:
    for _ in range(warm_up):
        step()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started) / steps


def show_kernels(step: Callable[[], object], steps: int = 4) -> None:
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    kernels = sorted(
        (
            (event.self_device_time_total / steps, event.count / steps, event.key)
            for event in profiler.key_averages()
            if event.self_device_time_total > 0 and event.device_type == DeviceType.CUDA
        ),
        reverse=True,
    )
    print(
        f"  {sum(k[0] for k in kernels) / 1e3:.3f} ms of {sum(k[1] for k in kernels):.0f} kernels"
    )
    for time_each, count, name in kernels[:SHOWN]:
        print(f"  {time_each:9.1f} us {count:6.1f} x {name[:120]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument(
        "--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES)
    )
    parser.add_argument("--members", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    print(f"torch {version('torch')}, {torch.cuda.get_device_name()}, {options.dtype}, with TF32")
    print("| size | architecture | SAEs | replayed, ms a step | not, ms | GPU memory, GiB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for size in options.sizes:
        d_in, d_sae, k = SIZES[size]
        batches = sparse_sums(size, 4096 if size == "large" else 1024, "cuda")
        for architecture, members in itertools.product(options.architectures, options.members):
            units = ("cuda", options.dtype, True)
            setting = Setting(architecture, d_in, d_sae, k, *batches, *units)
            torch.cuda.reset_peak_memory_stats()
            found = []
            for replay in (Replay, AsItIs):
                pack.Replay = replay  # type: ignore[misc,assignment]
                found.append(milliseconds(raysae(setting, members, "none"), options.steps))
            memory = torch.cuda.max_memory_allocated() / 2**30
            print(
                f"| {d_in} → {d_sae} | {architecture} | {members} | {found[0]:.2f} | "
                f"{found[1]:.2f} | {memory:.2f} |",
                flush=True,
            )
            if options.profile:
                show_kernels(raysae(setting, members, "none"))


if __name__ == "__main__":
    main()
