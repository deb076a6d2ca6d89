"""What a rung that is not a trial's last costs: the search half of the questions against all.

    python benchmarks/half_scores.py [--threads 1] [--steps 96] [--repeats 3] [--together 1]

Same process, cache and SAEs, the two in turn. Each SAE is trained on the world's corpora; a row
says the least wall-clock and processor seconds an SAE of either, the ratio of the processor
seconds, and whether the half's result is that half of the whole one, answer by answer.
"""

from __future__ import annotations

import argparse
import platform
import time
from importlib.metadata import version

import numpy as np
import torch
from unlearning_eval import SPECS, train

from raysae.unlearning import (
    CachedEvaluator,
    UnlearningResult,
    build_cache,
    default_eval_config,
    split_questions,
)
from raysae.worlds import load_world
from raysae.worlds.model import load_model


def same(a: UnlearningResult, b: UnlearningResult) -> bool:
    """Whether score, counts, features and every answer are equal."""
    answers = all(np.array_equal(a.is_correct[n], b.is_correct[n]) for n in b.is_correct)
    return answers and a.to_dict() == b.to_dict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=96, help="training steps of 1024 rows")
    parser.add_argument("--repeats", type=int, default=3, help="of each evaluation; least time")
    parser.add_argument("--together", type=int, default=1, help="SAEs scored in one pass")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    world = load_world("embedded")
    model, config = load_model(world), default_eval_config(world)
    cache = build_cache(world, model, world.default_hook_name, config)
    evaluator = CachedEvaluator(world, model, cache, config)
    half = split_questions(evaluator.known_questions, 0)
    rows = torch.cat(
        [torch.from_numpy(corpus.resid[corpus.counts]) for corpus in (cache.forget, cache.retain)]
    )
    packages = ("torch", "transformer-lens", "sae-lens", "sae-bench", "numpy")
    print("  ".join(f"{name} {version(name)}" for name in packages))
    print(
        f"{platform.machine()}, python {platform.python_version()}, {arguments.threads} thread(s)"
    )
    asked = {name: int(mask.sum()) for name, mask in half.items()}
    print(f"world {world.name}, known {evaluator.known_questions}, search half {asked}\n")
    print(f"{'':14}  all: wall    cpu   half: wall    cpu   ratio   score  half's   equal")
    for spec in SPECS:
        saes = [
            train(spec, rows, arguments.steps + 8 * extra) for extra in range(arguments.together)
        ]
        seconds: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        results: dict[bool, list[UnlearningResult]] = {}
        for turn in range(2 * arguments.repeats):
            part = bool(turn % 2)
            started, used = time.perf_counter(), time.process_time()
            results[part] = evaluator.evaluate_many(
                saes, training_steps=arguments.steps, questions=half if part else None
            )
            spent = (time.perf_counter() - started, time.process_time() - used)
            seconds[part].append((spent[0] / len(saes), spent[1] / len(saes)))
        whole_wall, whole_cpu = map(min, zip(*seconds[False], strict=True))
        half_wall, half_cpu = map(min, zip(*seconds[True], strict=True))
        equal = all(
            same(part, whole.on(half))
            for part, whole in zip(results[True], results[False], strict=True)
        )
        name = f"{spec.architecture} {spec.k or spec.l1_coefficient:g}"
        print(
            f"{name:14} {whole_wall:10.2f} {whole_cpu:6.2f} {half_wall:12.2f} {half_cpu:6.2f} "
            f"{whole_cpu / half_cpu:7.2f}  {results[False][0].score:.4f}  "
            f"{results[True][0].score:.4f}  {equal!s:5}",
            flush=True,
        )


if __name__ == "__main__":
    main()
