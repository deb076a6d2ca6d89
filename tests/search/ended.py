"""Trials that ended, as a confirmation finds them in the journal."""

from __future__ import annotations

from typing import Any

from raysae.config import RunConfig
from raysae.training.spec import TrialSpec

Record = dict[str, Any]


def config(top: int = 2, seeds: int = 3, seed: int = 0) -> RunConfig:
    return RunConfig(
        sae={"k": 4},
        space={"regularizer": {"none": None}},
        search={"seed": seed},
        confirm={"top": top, "seeds": seeds},
    )


def record(
    spec: TrialSpec,
    score: float,
    state: str = "finished",
    heldout: list[float] | None = None,
    transferred: list[float] | None = None,
) -> Record:
    """The journal's `end` record of a trial; of one of several seeds with their held-out scores,
    and their transferred ones where the version that wrote it had them."""
    rung: Record = {} if state == "failed" else {"score": score, "heldout_score": score}
    if heldout is not None:
        rung["seeds"] = [{"score": score, "heldout_score": value} for value in heldout]
    for seed, value in zip(rung.get("seeds", ()), transferred or (), strict=False):
        seed["transferred_score"] = value
    return {"trial": spec.number, "state": state, "spec": spec.to_dict(), "rung": rung, "error": ""}


def runs(specs: list[TrialSpec]) -> list[str]:
    return list(dict.fromkeys(spec.run for spec in specs))


def of_run(specs: list[TrialSpec], start: str) -> list[TrialSpec]:
    return [spec for spec in specs if spec.run.startswith(start)]
