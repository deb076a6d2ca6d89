"""What a search costs beyond training and scoring: the worker pool against a trainer per trial.

    python benchmarks/search_overhead.py [--trials 8] [--trainer-trials 3]

Both run the same trials (same specs, store, evaluator) on one worker with one thread, one after the
other in this process. The pool is `run_search` as users run it. The other side is the pattern of
Ray's documentation: a `TorchTrainer` inside every Tune trial. «Beyond compute» is the time from the
end of one trial to the end of the next, less its training and scoring.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console

from raysae.config import RunConfig, find_space, load_config
from raysae.journal import JOURNAL, ended_trials, read_journal
from raysae.search.run import resolve, run_search

SETTINGS = {
    "training.tokens": 131_072,
    "training.batch_size": 256,
    "search.scheduler.name": "none",
    "search.sampler": "random",
    "confirm.top": 0,
    "resources.workers": 1,
}


def measure_pool(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Run the search and read set-up time, cost a trial and busy share from its own records."""
    folder.mkdir()
    started = time.time()
    run_search(config, folder, Console(quiet=True))
    wall = time.time() - started
    ended = sorted(ended_trials(read_journal(folder / JOURNAL)), key=lambda r: r["ended"])
    compute = [r["rung"]["train_seconds"] + r["rung"]["score_seconds"] for r in ended]
    first_start = ended[0]["ended"] - compute[0]
    gaps = [
        after["ended"] - before["ended"] - seconds
        for before, after, seconds in zip(ended, ended[1:], compute[1:], strict=False)
    ]
    facts = json.loads((folder / "facts.json").read_text())
    return {
        "set-up, s": first_start - started,
        "beyond compute, s a trial": mean(gaps),
        "compute, s a trial": mean(compute),
        "wall, s": wall,
        "busy share of the search": sum(compute) / (ended[-1]["ended"] - first_start),
        "busy share with set-up": facts["busy_share"],
        "specs": [r["spec"] for r in sorted(ended, key=lambda r: r["trial"])],
        "scores": [r["rung"]["saebench_score"] for r in sorted(ended, key=lambda r: r["trial"])],
    }


def trainer_worker(settings: dict[str, Any]) -> None:
    """The documented pattern's training function: one trial, then the process ends."""
    import torch

    from raysae.training.loop import train_one
    from raysae.training.run import Progress, Rung, SAERun
    from raysae.training.spec import TrialSpec
    from raysae.unlearning import CachedEvaluator, default_eval_config
    from raysae.worlds import load_world
    from raysae.worlds.model import load_model

    torch.set_num_threads(1)
    world, store = load_world(settings["world"]), settings["store"]
    cache = store.open_evaluation_cache()
    evaluator = CachedEvaluator(world, load_model(world), cache, default_eval_config(world))

    def on_event(event: Progress | Rung) -> bool:
        if isinstance(event, Rung):
            seconds = event.train_seconds + event.score_seconds
            # Ray Train keeps reported metrics only beside a checkpoint.
            result = {"score": event.result.score, "compute": seconds}
            Path(settings["result"]).write_text(json.dumps(result))
        return True

    run = SAERun(TrialSpec(**settings["spec"]), store.open())
    train_one(run, lambda sae, steps: evaluator.evaluate(sae, training_steps=steps), on_event)


def measure_trainers(
    config: RunConfig, specs: list[dict[str, Any]], folder: Path
) -> dict[str, Any]:
    """The same trials, each a TorchTrainer inside a Tune trial, one after the other."""
    from raysae.search import cluster

    cluster.start(config, None, "search-overhead")
    import ray
    from ray import tune
    from ray.train import RunConfig as TrainRunConfig
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    from raysae.store.harvest import harvest

    assert config.hook is not None
    harvested = harvest(config.world, [config.hook], "float32", evaluation_cache=True)
    harvested.finish()
    store = harvested.stores[config.hook]

    def trial(point: dict[str, Any]) -> None:
        result = folder / f"result_{point['spec']['number']}.json"
        TorchTrainer(
            trainer_worker,
            train_loop_config={
                "world": config.world,
                "store": store,
                "spec": point["spec"],
                "result": str(result),
            },
            scaling_config=ScalingConfig(num_workers=1),
            run_config=TrainRunConfig(storage_path=str(folder / "train")),
        ).fit()
        tune.report({**json.loads(result.read_text()), "ended": time.time()})

    started = time.time()
    results = tune.Tuner(
        tune.with_resources(trial, {"CPU": 0.001}),
        param_space={"spec": tune.grid_search(specs)},
        tune_config=tune.TuneConfig(max_concurrent_trials=1),
        run_config=tune.RunConfig(name="trainers", storage_path=str(folder), verbose=0),
    ).fit()
    ray.shutdown()
    rows = sorted((r.metrics for r in results), key=lambda m: m["ended"])
    ends = [started, *(row["ended"] for row in rows)]
    gaps = [b - a - row["compute"] for a, b, row in zip(ends, ends[1:], rows, strict=False)]
    return {
        "beyond compute, s a trial": mean(gaps),
        "compute, s a trial": mean(row["compute"] for row in rows),
        "scores": [row["score"] for row in rows],
    }


def main() -> None:
    """Run both sides and print them beside each other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--trainer-trials", type=int, default=3)
    arguments = parser.parse_args()
    settings = SETTINGS | {"search.num_samples": arguments.trials}
    config = resolve(load_config(find_space("orth.yaml"), settings))
    print(f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores; ray {version('ray')}, "
          f"torch {version('torch')}")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        pool = measure_pool(config, Path(folder) / "pool")
        specs = pool["specs"][: arguments.trainer_trials]
        trainers = measure_trainers(config, specs, Path(folder) / "trainers")
    for name in ("set-up, s", "compute, s a trial", "beyond compute, s a trial"):
        other = f"{trainers[name]:8.2f}" if name in trainers else "       –"
        print(f"{name:<28} pool {pool[name]:8.2f}   trainer a trial {other}")
    print(f"busy share of the search, without set-up: {pool['busy share of the search']:.1%}")
    ratio = trainers["beyond compute, s a trial"] / pool["beyond compute, s a trial"]
    print(f"beyond compute, trainer a trial / pool: {ratio:.0f} x")
    equal = pool["scores"][: len(specs)] == trainers["scores"]
    print(f"same scores on both sides: {equal} {trainers['scores']}")


if __name__ == "__main__":
    main()
