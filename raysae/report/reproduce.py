"""A space file that trains one trial of a run again, with the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from raysae.analysis.tables import best_first
from raysae.report.run import Run

SPACE_FILE = "reproduce.yaml"


def write_space(run: Run) -> Path | None:
    """Write `reproduce.yaml` for the best trial; None where there is none, or no config to start
    from.

    Everything that decides the numbers is in it, the trial's own seed too.
    """
    done = run.finished if not run.finished.empty else run.scored
    if done.empty or not run.config:
        return None
    best = best_first(done).iloc[0]["trial"]
    path = run.folder / SPACE_FILE
    text = yaml.safe_dump(_space(run, int(best)), sort_keys=False, allow_unicode=True)
    head = f"# Trains trial {best} of this run again: python run_search.py --space {path.name}\n"
    path.write_text(head + text, encoding="utf-8")
    return path


def _space(run: Run, trial: int) -> dict[str, Any]:
    spec = run.specs[trial]
    keep = ("world", "hook", "objective", "evals", "resources")
    search = {
        "seeds": 1,
        "seeds_per_trial": spec.get("seeds", 1),  # of an older version: one
        "scheduler": run.config["search"]["scheduler"],
    }
    return {name: run.config[name] for name in keep if name in run.config} | {
        "search": search,
        "runs": {
            f"trial {trial}": {
                "regularizer": spec["regularizer"],
                "alpha": spec["alpha"],
                "alpha_schedule": spec["alpha_schedule"],
                "sae": spec["sae"],
                "training": spec["training"],
                "seed": spec["seed"],
            }
        },
    }
