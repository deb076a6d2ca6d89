"""Does the embedded world's unlearning score tell SAE configurations apart, beyond the seed?

    python benchmarks/world_signal.py [--seeds 3] [--steps 2500] [--processes 2]

Trains ordinary SAEs (no regularizer) of three architectures at three sparsities each, every one
with several seeds, scores them, and compares the spread of configurations with the spread of seeds:
one-way analysis of variance, F-test. Nothing here knows which configuration ought to win.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from scipy.stats import f_oneway

from raysae.store.activations import local_store
from raysae.training.loop import train_one
from raysae.training.run import Progress, Rung, SAERun
from raysae.training.spec import TrialSpec
from raysae.unlearning import CachedEvaluator, build_cache, default_eval_config
from raysae.worlds import load_world
from raysae.worlds.model import load_model

REFERENCE: tuple[dict[str, Any], ...] = (
    {"architecture": "standard", "l1_coefficient": 1.0},
    {"architecture": "standard", "l1_coefficient": 2.0},
    {"architecture": "standard", "l1_coefficient": 4.0},
    {"architecture": "topk", "k": 4},
    {"architecture": "topk", "k": 8},
    {"architecture": "topk", "k": 16},
    {"architecture": "batchtopk", "k": 4},
    {"architecture": "batchtopk", "k": 8},
    {"architecture": "batchtopk", "k": 16},
)
BATCH_SIZE, D_SAE = 1024, 512


@lru_cache(maxsize=1)
def _world() -> tuple[Any, CachedEvaluator]:
    torch.set_num_threads(1)
    world = load_world("embedded")
    model = load_model(world)
    config = default_eval_config(world)
    cache = build_cache(world, model, world.default_hook_name, config)
    store = local_store(world, model, world.default_hook_name)
    return store, CachedEvaluator(world, model, cache, config)


@dataclass(frozen=True)
class Outcome:
    """What is printed of one SAE."""

    index: int
    score: float
    status: str
    eligible: dict[float, int]
    multiplier: int | None
    metrics: dict[str, float]


def run_one(task: tuple[int, dict[str, Any], int, int]) -> Outcome:
    """Train and score one SAE: (index of the configuration, its fields, seed, steps)."""
    index, sae, seed, steps = task
    store, evaluator = _world()
    tokens = steps * BATCH_SIZE
    spec = TrialSpec(
        number=0,
        seed=seed,
        sae={**sae, "d_sae": D_SAE},
        training={"tokens": tokens, "batch_size": BATCH_SIZE},
        regularizer={"name": "none"},
        rungs=(tokens,),
    )
    rungs: list[Rung] = []

    def keep(event: Progress | Rung) -> bool:
        if isinstance(event, Rung):
            rungs.append(event)
        return True

    train_one(SAERun(spec, store), lambda s, n: evaluator.evaluate(s, training_steps=n), keep)
    rung = rungs[-1]
    result = rung.result
    print(f"{sae} seed {seed}: {result.score:.3f}", file=sys.stderr, flush=True)
    return Outcome(
        index=index,
        score=result.score,
        status=result.status.value,
        eligible=result.eligible_features,
        multiplier=result.best.multiplier if result.best else None,
        metrics=rung.metrics,
    )


def main() -> None:
    """Train, score, print the table and the test."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    tasks = [
        (index, sae, seed, arguments.steps)
        for seed in range(arguments.seeds)
        for index, sae in enumerate(REFERENCE)
    ]
    started = time.time()
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
        done = list(pool.map(run_one, tasks))
    print(f"torch {version('torch')}, sae-lens {version('sae-lens')}, "
          f"sae-bench {version('sae-bench')}; {arguments.steps} steps of {BATCH_SIZE}, "
          f"d_sae {D_SAE}; {time.time() - started:.0f} s")  # fmt: skip
    print("\n| SAE | scores | mean | L0 | EV | dead | eligible .001 / .01 | multiplier | status |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    groups = []
    for index, sae in enumerate(REFERENCE):
        outcomes = [outcome for outcome in done if outcome.index == index]
        scores = [outcome.score for outcome in outcomes]
        groups.append(scores)
        name = " ".join(str(value) for value in sae.values())
        eligible = outcomes[0].eligible
        mean = {key: np.mean([o.metrics[key] for o in outcomes]) for key in outcomes[0].metrics}
        multipliers = " ".join(str(outcome.multiplier) for outcome in outcomes)
        statuses = sorted({outcome.status for outcome in outcomes})
        print(
            f"| {name} | {' '.join(f'{s:.3f}' for s in scores)} | {np.mean(scores):.3f} "
            f"| {mean['l0']:.1f} | {mean['explained_variance']:.3f} | {mean['dead_features']:.0f} "
            f"| {' / '.join(str(n) for n in eligible.values())} | {multipliers} "
            f"| {', '.join(statuses)} |"
        )
    within = np.mean([np.var(scores, ddof=1) for scores in groups])
    between = np.var([np.mean(scores) for scores in groups], ddof=1)
    net = max(0.0, between - within / arguments.seeds)
    test = f_oneway(*groups)
    n = arguments.seeds * len(groups)
    print(
        f"\nseed standard deviation {within**0.5:.3f}, configurations net of seeds {net**0.5:.3f}"
    )
    print(f"F({len(groups) - 1},{n - len(groups)}) = {test.statistic:.2f}, p = {test.pvalue:.2g}")
    flat = [score for scores in groups for score in scores]
    print(f"{sum(s > 0 for s in flat)} of {n} scores above 0, highest {max(flat):.3f}")


if __name__ == "__main__":
    main()
