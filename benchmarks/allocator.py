"""What it saves to keep freed memory: a training step with glibc's defaults and with the workers'.

    python benchmarks/allocator.py [--repeats 3] [--steps 200]

The same steps of the default search's SAE (top-k, d_in 96, d_sae 512, 1024 rows, one thread), in
processes of their own, alternating; milliseconds a step, the least of the repeats, and the loss
after the last step, which must not differ.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version

from raysae.search.cluster import WORKER_ENVIRONMENT

D_IN, D_SAE, ROWS, K = 96, 512, 1024, 7
DEFAULTS = "glibc's defaults"


def measure(steps: int) -> dict[str, float]:
    """Milliseconds a step, and the last loss."""
    import torch

    from raysae.regularizers import REGISTRY
    from raysae.training.collective import Alone
    from raysae.training.saes import make_training_sae
    from raysae.training.spec import SAESpec
    from raysae.training.step import FiringRecord, train_step

    torch.set_num_threads(1)
    torch.manual_seed(0)
    batch, is_forget = torch.randn(ROWS, D_IN), torch.rand(ROWS) < 0.5
    sae = make_training_sae(
        SAESpec(architecture="topk", d_sae=D_SAE, k=K), D_IN, seed=0, device="cpu"
    )
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    firing = FiringRecord.zeros(D_SAE, torch.device("cpu"))
    started, loss = 0.0, torch.zeros(())
    for step in range(10 + steps):
        if step == 10:
            started = time.perf_counter()
        output = train_step(
            sae,
            optimizer,
            batch,
            is_forget,
            step=step,
            alpha=0.0,
            coefficients={},
            regularizer=REGISTRY["none"](),
            regularizer_state={},
            firing=firing,
            dead_after=1000,
            grad_clip=1.0,
            collective=Alone(),
        )
        loss = output.losses["loss"]
    seconds = time.perf_counter() - started
    return {"ms": 1e3 * seconds / steps, "loss": float(loss)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        sys.stdout.write(json.dumps(measure(options.steps)))
        return
    plain = {k: v for k, v in os.environ.items() if k not in WORKER_ENVIRONMENT}
    found: dict[str, list[dict[str, float]]] = {DEFAULTS: [], "kept": []}
    for _ in range(options.repeats):
        for name, environment in zip(found, (plain, plain | WORKER_ENVIRONMENT), strict=True):
            command = [sys.executable, __file__, "--child", "--steps", str(options.steps)]
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=True
            )
            found[name].append(json.loads(done.stdout))
    print(f"{platform.machine()}, {os.cpu_count()} cores; torch {version('torch')}")
    least = {name: min(run["ms"] for run in runs) for name, runs in found.items()}
    for name, milliseconds in least.items():
        print(f"{name:<18}{milliseconds:8.1f} ms a step")
    print(f"kept / defaults: {least['kept'] / least[DEFAULTS]:.2f}")
    losses = {run["loss"] for runs in found.values() for run in runs}
    print(f"same loss in all runs: {len(losses) == 1}")


if __name__ == "__main__":
    main()
