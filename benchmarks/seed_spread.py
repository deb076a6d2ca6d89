"""Is the spread over seeds that of the initial weights, or that of the order of the batches?

    python benchmarks/seed_spread.py [--saes 6] [--steps 768] [--k 4 8]

A pack could gather its batches once for all of its SAEs; their spread would then be that of the
initial weights alone. Here the same top-k SAE is trained with other weights on the same batches,
with the same weights on other batches, and with both other; the standard deviations of the scores
are printed side by side.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from raysae.store.activations import local_store
from raysae.training.loop import train
from raysae.training.run import Progress, Rung, SAERun
from raysae.training.spec import TrialSpec
from raysae.unlearning import CachedEvaluator, build_cache, default_eval_config
from raysae.worlds import load_world
from raysae.worlds.model import load_model

BATCH_SIZE, D_SAE = 1024, 512


def main() -> None:
    """Train, score, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--saes", type=int, default=6)
    parser.add_argument("--steps", type=int, default=768)
    parser.add_argument("--k", type=int, nargs="+", default=[4, 8])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    world = load_world("embedded")
    model = load_model(world)
    config = default_eval_config(world)
    cache = build_cache(world, model, world.default_hook_name, config)
    store = local_store(world, model, world.default_hook_name)
    evaluator = CachedEvaluator(world, model, cache, config)

    def evaluate(saes: list[object], steps: int) -> list[object]:
        return evaluator.evaluate_many(saes, training_steps=steps)

    def scores(specs: list[TrialSpec]) -> np.ndarray:
        found: list[float] = []

        def keep(events: list[Progress | Rung]) -> list[bool]:
            found.extend(event.result.score for event in events if isinstance(event, Rung))
            return [True] * len(events)

        train([SAERun(spec, store) for spec in specs], evaluate, keep)
        return np.array(found)

    started = time.time()
    print("| SAE | other | scores | mean | standard deviation |\n| --- | --- | --- | --- | --- |")
    for k in arguments.k:
        tokens = arguments.steps * BATCH_SIZE
        seeds = range(1, arguments.saes + 1)
        same = TrialSpec(
            number=0,
            seed=0,
            batch_seed=0,
            sae={"architecture": "topk", "d_sae": D_SAE, "k": k},
            training={"tokens": tokens, "batch_size": BATCH_SIZE},
            regularizer={"name": "none"},
            rungs=(tokens,),
        )
        cases = {
            "weights": [same.model_copy(update={"seed": s}) for s in seeds],
            "batches": [same.model_copy(update={"batch_seed": s}) for s in seeds],
            "both": [same.model_copy(update={"seed": s, "batch_seed": s}) for s in seeds],
        }
        for name, specs in cases.items():
            found = scores(specs)
            listed = " ".join(f"{score:.3f}" for score in found)
            print(
                f"| topk {k} | {name} | {listed} | {found.mean():.3f} | {found.std(ddof=1):.3f} |",
                flush=True,
            )
    print(f"\n{arguments.steps} steps of {BATCH_SIZE}; {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
