"""The training step at the sizes of published SAEs: tokens a second, share of the peak, memory.

    python benchmarks/train_step.py [--sizes 2304x16384 2304x65536] [--architectures topk …]
        [--regularizers none|all|NAME …] [--members 1] [--batch-size 4096] [--steps 20]
        [--dtype bfloat16|float32] [--tf32|--no-tf32] [--device cuda|cpu]

Of every size, architecture and regularizer it takes `--steps` steps of a pack of `--members` SAEs,
on activations that lie on the device, after `--warm-up` steps. It needs torch and SAELens, no Ray.

- tokens/s: of one SAE; times the members is what the device trains.
- share of peak: operations of the SAE's own products over time and peak. The peak is the fastest
  of a few bare products in the same run and dtype (and TF32 setting), on a CPU by the faster of
  the libraries that raysae/products.py takes. Of n tokens an SAE needs 10 · n · d_in · d_sae
  operations (encoder forward and its weights' gradient 4, decoder 6), gated 16 (two decoders), or
  2 · n · d_in · d_sae + 8 · n · k · d_in where k features are picked. A penalty's operations are
  not among them: it costs share.
- memory: the most that was allocated during the steps, weights, gradients and Adam's moments
  included; on a CPU the most that the process held, above what it held before the case.
- waits: times a step that the host waits for the GPU (torch.cuda.set_sync_debug_mode).

`--dtype` is that of the SAE's products, as `training.autocast` sets it; weights, moments, losses
and penalties are float32, whose products use TF32 as `training.tf32` sets it: by default as in a
search. What does not fit in memory is said.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import platform
import re
import statistics
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from raysae import products
from raysae.regularizers import REGISTRY
from raysae.training.pack import Pack
from raysae.training.precision import tf32
from raysae.training.run import SAERun
from raysae.training.spec import SPARSITY_FIELD, TrainingSpec, TrialSpec

ARCHITECTURES = tuple(SPARSITY_FIELD)
SIZES = ("2304x16384", "2304x65536")
SPARSITY = {"k": 64.0, "l1_coefficient": 5.0, "l0_coefficient": 1.0}
PERIOD = 200
"""`group_update_period`; what an update costs stands in benchmarks/regularizers.py."""
STEPS = 10**6
"""Of the schedules: nothing decays, and no feature dies."""
BATCHES = 4


@dataclass(frozen=True)
class Case:
    """What is measured."""

    d_in: int
    d_sae: int
    architecture: str
    regularizer: str
    members: int
    rows: int
    dtype: str
    tf32: bool
    device: torch.device

    @property
    def operations(self) -> float:
        """Of all members' own products in a step."""
        product = 2 * self.rows * self.d_in * self.d_sae
        dense = {"gated": 8, "standard": 5, "jumprelu": 5}.get(self.architecture)
        picked = product + 8 * self.rows * SPARSITY["k"] * self.d_in
        return self.members * (picked if dense is None else dense * product)

    def spec(self) -> TrialSpec:
        """Raises ValueError where the regularizer cannot work on the architecture."""
        method, field = REGISTRY[self.regularizer], SPARSITY_FIELD[self.architecture]
        periodic = "group_update_period" in method.model_fields
        trial = TrialSpec(
            number=0,
            seed=0,
            seeds=self.members,
            sae={"architecture": self.architecture, "d_sae": self.d_sae, field: SPARSITY[field]},
            training=TrainingSpec(
                tokens=STEPS * self.rows,
                batch_size=self.rows,
                lr=1e-4,
                lr_warmup=0,
                lr_decay=0,
                dead_after=STEPS,
                autocast="bfloat16" if self.dtype == "bfloat16" else "off",
                tf32=self.tf32,
            ),
            regularizer=method(**({"group_update_period": PERIOD} if periodic else {})),
            alpha=1.0 if method.uses_alpha else 0.0,
            rungs=(STEPS * self.rows,),
        )
        trial.regularizer.check(self.architecture, self.d_sae, STEPS)
        return trial


class Source:
    """Batches of Gaussian rows with E‖x‖² = d_in, on the device."""

    def __init__(self, case: Case) -> None:
        self.d_in, self.scale, self.variance = case.d_in, 1.0, float(case.d_in)
        self.mean = torch.zeros(case.d_in, device=case.device)
        shape = (BATCHES, case.rows, case.d_in)
        generator = torch.Generator(case.device).manual_seed(0)
        self._rows = torch.randn(shape, generator=generator, device=case.device)
        self._is_forget = torch.arange(case.rows, device=case.device) % 2 == 0

    def batch(
        self, seed: int, step: int, batch_size: int, rank: int = 0, size: int = 1
    ) -> tuple[Tensor, Tensor]:
        return self._rows[(seed + step) % BATCHES], self._is_forget

    def batches(
        self, seeds: Sequence[int], step: int, batch_size: int, rank: int = 0, size: int = 1
    ) -> tuple[Tensor, Tensor]:
        batches, labels = zip(*(self.batch(s, step, batch_size) for s in seeds), strict=True)
        return torch.stack(batches), torch.stack(labels)

    def with_forget_share(self, forget_share: float) -> Source:
        raise ValueError("the benchmark's batches have a share of their own")

    def done_with(self, seeds: Collection[int]) -> None:
        pass


def seconds_each(run: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Of `repeats` calls, by the device's own clock."""
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
        return times
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in itertools.pairwise(marks)]


def peak(rows: int, d_in: int, d_sae: int, dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of the fastest of some bare products, by the faster library."""
    shapes = [(rows, d_in, d_sae), (d_in, rows, d_sae)]
    shapes += [(8192, 8192, 8192)] if device.type == "cuda" else [(1024, 1024, 1024)]
    found = 0.0
    for n, k, m in shapes:
        left = torch.randn(n, k, device=device, dtype=dtype)
        right = torch.randn(k, m, device=device, dtype=dtype)
        out = torch.empty(n, m, device=device, dtype=dtype)

        def product(left: Tensor = left, right: Tensor = right, out: Tensor = out) -> None:
            torch.mm(left, right, out=out)

        def raysaes(left: Tensor = left, right: Tensor = right) -> None:
            products.matmul(left, right)

        repeats = 20 if device.type == "cuda" else 3
        for run in (product, raysaes) if device.type == "cpu" else (product,):
            run()
            found = max(found, 2 * n * k * m / min(seconds_each(run, repeats, device)))
    return found


class Memory:
    """The most memory that is held from now on, in bytes."""

    def __init__(self, device: torch.device) -> None:
        gc.collect()
        self._cuda = device.type == "cuda"
        self._before = 0 if self._cuda else _status("VmRSS")
        if self._cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError):  # else the peak is that of the whole process
                Path("/proc/self/clear_refs").write_text("5")

    def most(self) -> int:
        if self._cuda:
            return torch.cuda.max_memory_allocated()
        return _status("VmHWM") - self._before


def _status(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"{name}:\s+(\d+) kB", text)
    return int(found[1]) << 10 if found else 0


def waits(step: Callable[[], object]) -> int:
    """Times that the host waits for the GPU in a step."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def measure(case: Case, options: argparse.Namespace, rate: float) -> str:
    """The row of one case, `rate` being the peak."""
    memory = Memory(case.device)
    source = Source(case)
    pack = Pack([SAERun(m, source, device=str(case.device)) for m in case.spec().members()])
    for _ in range(options.warm_up):
        pack.advance()
    times = seconds_each(pack.advance, options.steps, case.device)
    most = memory.most()
    waited = str(waits(pack.advance)) if case.device.type == "cuda" else ""
    seconds = statistics.median(times)
    return (
        f"{1e3 * seconds:.1f} ({1e3 * min(times):.1f} to {1e3 * max(times):.1f}) | "
        f"{case.rows / seconds:,.0f} | {case.operations / seconds / rate:.0%} | "
        f"{most / 2**30:.2f} | {waited}"
    )


def cases(options: argparse.Namespace) -> Iterator[Case]:
    names = list(REGISTRY) if "all" in options.regularizers else options.regularizers
    for size, architecture, name in itertools.product(options.sizes, options.architectures, names):
        d_in, d_sae = (int(part) for part in size.split("x"))
        device = torch.device(options.device)
        yield Case(
            d_in,
            d_sae,
            architecture,
            name,
            options.members,
            options.batch_size,
            options.dtype,
            options.tf32,
            device,
        )


def row(case: Case, options: argparse.Namespace, rate: float) -> str:
    """As `measure`, or why there is none."""
    try:
        return measure(case, options, rate)
    except ValueError as error:
        return f"refused: {str(error).split(':')[0]} | | | |"
    except ImportError as error:  # of a method that regroups: scikit-learn
        return f"not measured: {error} | | | |"
    except (torch.OutOfMemoryError, MemoryError) as error:
        return f"out of memory: {str(error).split('.')[0]} | | | |"


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), help="D_INxD_SAE")
    parser.add_argument(
        "--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES)
    )
    parser.add_argument("--regularizers", nargs="+", choices=[*REGISTRY, "all"], default=["all"])
    parser.add_argument("--members", type=int, default=1, help="SAEs of a pack")
    parser.add_argument("--batch-size", type=int, default=4096 if on_gpu else 256)
    parser.add_argument("--warm-up", type=int, default=5 if on_gpu else 1)
    parser.add_argument("--steps", type=int, default=20 if on_gpu else 3)
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="bfloat16" if on_gpu else "float32"
    )
    parser.add_argument("--tf32", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if on_gpu else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    print(
        f"torch {version('torch')}, sae-lens {version('sae-lens')}, python "
        f"{platform.python_version()}, {where}, {options.threads} threads; products in "
        f"{options.dtype}, float32 {'with' if options.tf32 else 'without'} TF32; "
        f"{options.batch_size} rows a step, {options.members} SAEs a pack"
    )
    shown: tuple[int, int] | None = None
    rate = 0.0
    for case in cases(options):
        if shown != (case.d_in, case.d_sae):
            shown = (case.d_in, case.d_sae)
            dtype = getattr(torch, options.dtype)
            with tf32(options.tf32):
                rate = peak(options.batch_size, *shown, dtype, device)
            print(f"\n{case.d_in} → {case.d_sae}: bare products reach {rate / 1e12:.2f} Tflop/s")
            print(
                "| architecture | regularizer | ms a step (range) | tokens/s an SAE "
                "| share of peak | memory, GiB | waits |"
            )
            print("| --- | --- | --- | --- | --- | --- | --- |")
        line = row(case, options, rate)
        print(f"| {case.architecture} | {case.regularizer} | {line} |", flush=True)


if __name__ == "__main__":
    main()
