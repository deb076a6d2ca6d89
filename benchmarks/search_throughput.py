"""What packs gain a whole search: SAEs trained and scored together against one by one.

    python benchmarks/search_throughput.py [--trials 24] [--tokens N] [--workers N]
        [--sides packs pairs alone saelens]

The same SAEs on every side, those of the default search:

- alone: every SAE is a trial of its own, trained and scored by itself, by raysae's step;
- packs: the search as it is, the seeds of a trial together on a worker;
- pairs: two trials at a time on a worker, all their seeds together;
- saelens: as alone, by SAELens' own step.

Every trial is trained to its end and chosen at random, since TPE and ASHA decide by what has ended
before, and the sides would do different work. Each side is a search as users run it, one after the
other, the first of them on `packs`, which says what the trials are; the others find activations in
the cache. Wall time is that between the first trial's start and the last one's end, so that what is
paid once counts for nobody. Train and score seconds are sums over all SAEs, on all workers. Scores
and losses are compared SAE by SAE with those of `packs`.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from raysae.analysis.seeds import seed_records
from raysae.config import RunConfig, find_space, load_config
from raysae.journal import JOURNAL, ended_trials, read_journal
from raysae.search.run import resolve, run_search
from raysae.training.spec import TrialSpec

SIDES = ("packs", "pairs", "alone", "saelens")
SETTINGS = {
    "search.scheduler.name": "none",
    "search.sampler": "random",
    "confirm.top": 0,
    "resources.trials_per_pack": 1,
}


@dataclass(frozen=True)
class Side:
    """Seconds, and what came out by SAE: every trial's seeds in order."""

    wall: float
    training: float
    scoring: float
    scores: list[float]
    losses: list[float]
    specs: list[dict[str, Any]]


def measure(config: RunConfig, folder: Path) -> Side:
    """Run a search and read its own records."""
    folder.mkdir()
    run_search(resolve(config), folder, Console(quiet=True))
    records = read_journal(folder / JOURNAL)
    ended = sorted(ended_trials(records), key=lambda record: record["trial"])
    started = min(record["time"] for record in records if record["event"] == "start")
    saes = [sae for record in ended for sae in seed_records(record["rung"])]
    return Side(
        wall=max(record["ended"] for record in ended) - started,
        training=sum(sae["train_seconds"] for sae in saes),
        scoring=sum(sae["score_seconds"] for sae in saes),
        scores=[sae["saebench_score"] for sae in saes],
        losses=[sae["metrics"]["loss"] for sae in saes],
        specs=[record["spec"] for record in ended],
    )


def one_by_one(config: RunConfig, specs: list[dict[str, Any]], step: str) -> RunConfig:
    """The same SAEs, each a run of a study."""
    runs = {}
    for spec in specs:
        for index, member in enumerate(TrialSpec(**spec).members()):
            runs[f"trial {member.number} seed {index}"] = {
                "regularizer": spec["regularizer"],
                "alpha": spec["alpha"],
                "alpha_schedule": spec["alpha_schedule"],
                "sae": spec["sae"],
                "training": spec["training"] | {"step": step},
                "seed": member.seed,
            }
    data = config.model_dump(mode="json", by_alias=True)
    data["search"] |= {"seeds_per_trial": 1}
    return RunConfig.model_validate(data | {"space": None, "runs": runs})


def largest_difference(found: list[float], expected: list[float]) -> float:
    """Of two lists, entry by entry."""
    return max(abs(ours - theirs) for ours, theirs in zip(found, expected, strict=True))


def main() -> None:
    """Run the sides and print them beside each other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--space", default="orth.yaml")
    parser.add_argument("--trials", type=int, help="default: the space's")
    parser.add_argument("--tokens", type=int, help="of a trial; default: the space's")
    parser.add_argument("--workers", type=int, help="default: as of any search")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    options = parser.parse_args()
    settings = SETTINGS | {
        name: value
        for name, value in {
            "search.num_samples": options.trials,
            "training.tokens": options.tokens,
            "resources.workers": options.workers,
        }.items()
        if value is not None
    }
    space = find_space(options.space)
    config = load_config(space, settings)
    print(
        f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores; ray {version('ray')}, "
        f"torch {version('torch')}, load average {os.getloadavg()[0]:.0f}",
        flush=True,
    )
    sides: dict[str, Side] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in dict.fromkeys(("packs", *options.sides)):
            made = config
            if name == "pairs":
                made = load_config(space, settings | {"resources.trials_per_pack": 2})
            elif name != "packs":
                step = "packed" if name == "alone" else "saelens"
                made = one_by_one(config, sides["packs"].specs, step)
            sides[name] = measure(made, Path(folder) / name)
            print(f"{name}: {sides[name].wall:.1f} s", flush=True)
    packs = sides["packs"]
    print(f"\n{len(packs.specs)} trials, {len(packs.scores)} SAEs")
    print("| | wall, s | training, s | scoring, s | wall / packs | scores differ | losses differ |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, side in sides.items():
        print(
            f"| {name} | {side.wall:.1f} | {side.training:.1f} | {side.scoring:.1f} | "
            f"{side.wall / packs.wall:.2f} | {largest_difference(side.scores, packs.scores):.2g} | "
            f"{largest_difference(side.losses, packs.losses):.2g} |"
        )


if __name__ == "__main__":
    main()
