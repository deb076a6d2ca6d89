"""What each regularizer adds to a training step.

    python benchmarks/regularizers.py [--size small|large|both] [--device cpu|cuda] [--threads 2]

For a BatchTopK SAE of (d_in 96, d_sae 512, 1024 rows a step) and of (d_in 2304, d_sae 16384, 4096
rows a step): seconds of a whole step without a regularizer, and on top of it, in the same process,
seconds of the penalty (forward and backward), of looking at a batch, and of an update of the
groups. The share adds them up as often as they happen in `--period` steps, over the step without a
regularizer.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from importlib.metadata import version

import torch

from raysae.regularizers import REGISTRY, Regularizer, State, StepView
from raysae.training.collective import Alone
from raysae.training.saes import make_training_sae
from raysae.training.spec import SAESpec
from raysae.training.step import FiringRecord, train_step

SIZES = {"small": (96, 512, 1024), "large": (2304, 16384, 4096)}
K = 32.0


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
    sae = make_training_sae(
        SAESpec(architecture="batchtopk", d_sae=d_sae, k=K), d_in, seed=0, device=str(device)
    )
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-4)
    firing, none = FiringRecord.zeros(d_sae, device), REGISTRY["none"]()

    def step() -> None:
        train_step(
            sae,
            optimizer,
            batch,
            is_forget,
            step=0,
            alpha=0.0,
            coefficients={},
            regularizer=none,
            regularizer_state={},
            firing=firing,
            dead_after=1000,
            grad_clip=1.0,
            collective=Alone(),
        )

    base = seconds(step, repeats, device)
    print(f"\nd_in {d_in}, d_sae {d_sae}, {rows} rows a step: {base * 1e3:.1f} ms without penalty")
    print("method                 penalty ms  a look ms  looks  update ms  updates   share of step")
    with torch.no_grad():
        acts = sae.encode(batch)
        view = StepView(sae.W_dec.detach(), acts, is_forget, sae.decode(acts) - batch)
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
