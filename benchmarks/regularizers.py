"""What each regularizer adds to a training step.

    python benchmarks/regularizers.py [--size small|large|both] [--device cpu|cuda] [--threads 2]

For a BatchTopK SAE of (d_in 96, d_sae 512, 1024 rows a step) and of (d_in 2304, d_sae 16384, 4096
rows a step): seconds of a whole step without a regularizer, the packed step of one SAE that trials
take by default, and on top of it, in the same process, seconds of the penalty (forward and
backward), of looking at a batch, and of an update of the groups. The share adds them up as often as
they happen in `--period` steps, over the step without a regularizer.

Not counted: an SAE that picks its features has sparse activations, which the packed step makes
dense for those that look at them, and the little that a step does beside a penalty to have one.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from importlib.metadata import version

import torch
from torch import Tensor

from raysae.regularizers import REGISTRY, Regularizer, State, StepView
from raysae.training.pack import Pack
from raysae.training.precision import tf32
from raysae.training.run import SAERun
from raysae.training.spec import TrialSpec

SIZES = {"small": (96, 512, 1024), "large": (2304, 16384, 4096)}
K = 32.0
STEPS = 10**6
"""Of the run: far from its end, and longer than any period."""


class OneBatch:
    """A source of activations that gives the same batch at every step."""

    scale = 1.0

    def __init__(self, batch: Tensor, is_forget: Tensor) -> None:
        self._batch = batch, is_forget
        self.d_in, self.mean = batch.shape[1], batch.mean(0)
        self.variance = float(batch.var(0).sum())

    def batch(self, *_: int) -> tuple[Tensor, Tensor]:
        return self._batch


def seconds(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """The least of `repeats` timings, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def make(name: str, period: int) -> Regularizer:
    fields = REGISTRY[name].model_fields
    return REGISTRY[name](
        **({"group_update_period": period} if "group_update_period" in fields else {})
    )


def penalty_step(method: Regularizer, view: StepView, state: State) -> None:
    """Forward and backward of the penalty alone."""
    W_dec, acts = (t.detach().requires_grad_() for t in (view.W_dec, view.acts))
    with tf32(True):  # as a training step's, on a GPU
        penalty = method.penalty(StepView(W_dec, acts, view.is_forget, view.error), state)
        if penalty.requires_grad:
            penalty.backward()


def measure(size: str, device: torch.device, period: int, repeats: int) -> None:
    d_in, d_sae, rows = SIZES[size]
    torch.manual_seed(0)
    directions = torch.randn(d_sae, d_in, device=device)
    fires = torch.rand(rows, d_sae, device=device) < K / d_sae
    batch = (fires * torch.rand(rows, d_sae, device=device)) @ directions
    is_forget = torch.rand(rows, device=device) < 0.5
    spec = TrialSpec(
        number=0,
        seed=0,
        sae={"architecture": "batchtopk", "d_sae": d_sae, "k": K},
        training={"tokens": STEPS * rows, "batch_size": rows},
        regularizer={"name": "none"},
        rungs=(STEPS * rows,),
    )
    run = SAERun(spec, OneBatch(batch, is_forget), device=str(device))
    base = seconds(Pack([run]).advance, repeats, device)
    print(f"\nd_in {d_in}, d_sae {d_sae}, {rows} rows a step: {base * 1e3:.1f} ms without penalty")
    print("method                 penalty ms  a look ms  looks  update ms  updates   share of step")
    with torch.no_grad():
        acts = run.sae.encode(batch)
        view = StepView(run.sae.W_dec.detach(), acts, is_forget, run.sae.decode(acts) - batch)
    for name in REGISTRY:
        line = added(make(name, period), view, base, period, repeats)
        print(f"{name:24} {line}", flush=True)


def added(method: Regularizer, view: StepView, base: float, period: int, repeats: int) -> str:
    """The line of one method, `base` being the seconds of a step without it."""
    (d_sae, d_in), device = view.W_dec.shape, view.W_dec.device
    state = method.init_state(d_in, d_sae, device)
    with torch.no_grad():
        row = StepView(view.W_dec, view.acts[:1], view.is_forget[:1], view.error[:1])
        looks = sum(bool(method.statistics(row, state, i)) for i in range(period))
        statistics = method.statistics(view, state, 0)
        look = seconds(lambda: method.statistics(view, state, 0), repeats, device)
        plain = seconds(lambda: method.update(state, statistics, view.W_dec, 1), repeats, device)
        method.update(state, statistics, view.W_dec, 0)  # imports scikit-learn where it is used
        started = time.perf_counter()
        method.update(state, statistics, view.W_dec, 0)
        update = time.perf_counter() - started
    penalty = seconds(lambda: penalty_step(method, view, state), repeats, device)
    updates = int("group_update_period" in type(method).searchable)
    total = penalty * period + (look + plain) * looks + update * updates
    return (
        f"{penalty * 1e3:8.2f} {look * 1e3:10.2f} {looks:6} {update * 1e3:10.1f} {updates:8} "
        f"{total / (base * period):14.1%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=[*SIZES, "both"], default="both")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--period", type=int, default=200, help="group_update_period")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    print(
        f"torch {version('torch')}, sae-lens {version('sae-lens')}, python "
        f"{platform.python_version()}, {where}, {arguments.threads} threads, period "
        f"{arguments.period}"
    )
    for size in SIZES if arguments.size == "both" else [arguments.size]:
        measure(size, device, arguments.period, arguments.repeats)


if __name__ == "__main__":
    main()
