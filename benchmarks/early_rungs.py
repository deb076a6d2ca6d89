"""Does a score early in training tell the score at its end?

    python benchmarks/early_rungs.py [--space orth.yaml] [--trials 12] [--fractions 0.25 0.5 1]

ASHA stops trials at a rung by their scores there, which is worth as much as those scores agree with
the ones at the end. Random configurations of a space are trained to the end and scored at every
fraction, as in a search (mean over the seeds of a trial, on the half of the questions that a search
sees); printed are their scores, the rank correlation of each rung with the last, and what scoring
and training cost: a scored rung saves nothing where it costs more than the training it cuts short.
"""

from __future__ import annotations

import argparse
import math

import numpy as np
import optuna
import torch
from sae_lens import SAE
from scipy.stats import spearmanr

from raysae.config import find_space, load_config
from raysae.store.activations import local_store
from raysae.training.loop import Event, train
from raysae.training.run import Rung, SAERun
from raysae.training.spec import TrialSpec
from raysae.unlearning import (
    CachedEvaluator,
    UnlearningResult,
    build_cache,
    default_eval_config,
    split_questions,
)
from raysae.worlds import load_world
from raysae.worlds.model import load_model


def main() -> None:
    """Train, score, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--space", default="orth.yaml")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.25, 0.5, 1.0])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(find_space(arguments.space))
    assert config.space is not None
    world = load_world(config.world)
    model = load_model(world)
    hook = config.hook or world.default_hook_name
    eval_config = default_eval_config(world)
    evaluator = CachedEvaluator(
        world, model, build_cache(world, model, hook, eval_config), eval_config
    )
    store = local_store(world, model, hook)
    batch = config.training.batch_size
    rungs = tuple(batch * math.ceil(f * config.training.steps) for f in sorted(arguments.fractions))

    def trained(spec: TrialSpec) -> list[list[Rung]]:
        """The rungs of a trial, each a list over its seeds."""
        found: list[list[Rung]] = []

        def keep(events: list[Event]) -> list[bool]:
            rungs_now = [event for event in events if isinstance(event, Rung)]
            if rungs_now:
                found.append(rungs_now)
            return [True] * len(events)

        def ask(saes: list[SAE], steps: int) -> list[UnlearningResult]:
            return evaluator.evaluate_many(saes, training_steps=steps, questions=half)

        train([SAERun(member, store) for member in spec.members()], ask, keep)
        return found

    half = split_questions(evaluator.known_questions, config.objective.split_seed)
    steps = [rung // batch for rung in rungs]
    print(
        f"{arguments.trials} random trials of {config.search.seeds_per_trial} SAEs, score at step"
    )
    print(f"| trial | {' | '.join(map(str, steps))} |")
    print("| --- |" + " --- |" * len(steps))
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=config.search.seed))
    scores, train_seconds, score_seconds = [], 0.0, 0.0
    for number in range(arguments.trials):
        spec = config.trial_spec(number, config.space.sample(study.ask()))
        found = trained(spec.model_copy(update={"rungs": rungs}))
        scores.append([np.mean([r.result.score for r in at]) for at in found])
        train_seconds += sum(rung.train_seconds for rung in found[-1])
        score_seconds += sum(rung.score_seconds for at in found for rung in at)
        cells = " | ".join(f"{score:.3f}" for score in scores[-1])
        print(f"| {number} {spec.regularizer.name} | {cells} |", flush=True)
    table = np.array(scores)
    print("\nrank correlation with the last:")
    for step, column in zip(steps[:-1], table.T[:-1], strict=True):
        print(f"  step {step}: {spearmanr(column, table[:, -1]).statistic:.2f}")
    saes = arguments.trials * config.search.seeds_per_trial
    print(
        f"seconds an SAE: {train_seconds / saes / steps[-1] * 100:.2f} for 100 steps, "
        f"{score_seconds / saes / len(steps):.2f} for a score"
    )


if __name__ == "__main__":
    main()
