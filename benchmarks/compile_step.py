"""Whether `torch.compile` pays for dense SAEs: the gain of a step against the time to compile it.

    python benchmarks/compile_step.py [--sizes 128x512 512x4096] [--members 1]
        [--architectures standard gated jumprelu] [--rows 1024] [--turns 10] [--threads 1]

For each case two packs of the same SAEs and batches, one whose forward pass (and with it the
backward pass) is compiled by Inductor, take steps in turns; everything else of a step (penalty,
counts, clipping, Adam) is the same code in both. Needs a C++ compiler on a CPU.

- ms a step: median over `--turns` of CPU time, and in brackets of wall time.
- compile, s: CPU time that the first compiled step takes beyond a plain one, the C++ compiler's
  included, with an empty cache of Inductor's; again: with the cache that the first one has filled.
  What the very first compilation of a process takes besides is given above the table.
- pays after: steps after which the gain has paid for the first compile time, by CPU time.
- apart: the largest relative difference of the two losses over all steps.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import torch
from train_step import Case, Source

from raysae.training.pack import Pack
from raysae.training.run import SAERun

DENSE = ("standard", "gated", "jumprelu")


def packed(case: Case) -> Pack:
    source = Source(case)
    return Pack([SAERun(m, source, device="cpu") for m in case.spec().members()])


def compiled(case: Case) -> Pack:
    pack = packed(case)
    pack._forward = torch.compile(pack._forward)
    return pack


def cpu_seconds() -> float:
    """Of this process and of the compilers that it has started."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def step(pack: Pack) -> tuple[float, float, torch.Tensor]:
    """CPU and wall seconds of a step, and its losses."""
    cpu, wall = cpu_seconds(), time.perf_counter()
    losses = pack.advance()["loss"]
    return cpu_seconds() - cpu, time.perf_counter() - wall, losses


@contextmanager
def empty_cache() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        yield


def measure(case: Case, turns: int) -> str:
    plain = packed(case)
    losses = {"plain": [step(plain)[2]], "compiled": []}
    times: dict[str, list[tuple[float, float]]] = {"plain": [], "compiled": []}
    torch.compiler.reset()
    cold = compiled(case)
    first, _, loss = step(cold)
    losses["compiled"].append(loss)
    for _ in range(turns):
        for name, pack in (("plain", plain), ("compiled", cold)):
            cpu, wall, loss = step(pack)
            times[name].append((cpu, wall))
            losses[name].append(loss)
    torch.compiler.reset()
    again = step(compiled(case))[0]

    apart = torch.stack(losses["compiled"]) / torch.stack(losses["plain"]) - 1
    cpu = {name: statistics.median(t for t, _ in found) for name, found in times.items()}
    wall = {name: statistics.median(t for _, t in found) for name, found in times.items()}
    gain = cpu["plain"] - cpu["compiled"]
    compiling = first - cpu["plain"]
    pays = f"{compiling / gain:,.0f}" if gain > 0 else "never"
    cells = [f"{1e3 * cpu[name]:.1f} ({1e3 * wall[name]:.1f})" for name in cpu]
    return (
        f"{cells[0]} | {cells[1]} | {cpu['plain'] / cpu['compiled']:.2f} | {compiling:.1f} / "
        f"{again - cpu['plain']:.1f} | {pays} | {float(apart.abs().max()):.0e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["128x512", "512x4096"], help="D_INxD_SAE")
    parser.add_argument("--architectures", nargs="+", choices=DENSE, default=list(DENSE))
    parser.add_argument("--members", type=int, default=1, help="SAEs of a pack")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # Compiled in this process, whose CPU time is counted.
    torch._inductor.config.compile_threads = 1
    print(
        f"torch {version('torch')}, python {platform.python_version()}, {platform.machine()}, "
        f"{options.threads} threads, {options.rows} rows a step, {options.members} SAEs a pack; "
        f"load average {os.getloadavg()[0]:.1f}"
    )
    with empty_cache():
        began = cpu_seconds()
        torch.compile(torch.sin)(torch.ones(1))
    print(f"a first compilation of nothing: {cpu_seconds() - began:.1f} s of CPU time\n")
    print(
        "| size | architecture | plain, ms a step | compiled | gain | compile, s / again | pays "
        "after, steps | apart |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for size, architecture in itertools.product(options.sizes, options.architectures):
        d_in, d_sae = (int(part) for part in size.split("x"))
        case = Case(
            d_in,
            d_sae,
            architecture,
            "none",
            options.members,
            options.rows,
            "float32",
            True,
            torch.device("cpu"),
        )
        with empty_cache():
            line = measure(case, options.turns)
        print(f"| {d_in} → {d_sae} | {architecture} | {line} |", flush=True)


if __name__ == "__main__":
    main()
