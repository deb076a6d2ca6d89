"""What the report says a study has shown, and what it says it has not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from raysae.analysis.runs import FIGURES, runs_table
from raysae.report.words import headline


def said(scores: dict[str, list[float]]) -> str:
    """The headline of a study by run, the first without a regularizer, with held-out scores by
    seed."""
    rows: list[dict[str, Any]] = [
        dict.fromkeys(FIGURES, value)
        | {"run": run, "seed": seed, "state": "finished", "status": "ok", "training_steps": 8}
        | {"regularizer": "grouped" if number else "none"}
        for number, (run, values) in enumerate(scores.items())
        for seed, value in enumerate(values)
    ]
    one = pd.DataFrame([0])
    return headline(SimpleNamespace(trials=one, scored=one, runs=runs_table(pd.DataFrame(rows))))


def test_of_one_seed_each_nothing_is_shown():
    rng = np.random.default_rng(0)
    text = said({name: list(rng.normal(0.3, 0.05, 1)) for name in "abcdefghi"})
    assert text.endswith("With one seed each nothing is shown of how they differ from the run "
                         "without a regularizer.")  # fmt: skip
    assert "ahead" not in text


@pytest.mark.parametrize("seeds", [2, 3])
def test_of_noise_nothing_is_shown(seeds: int):
    """In both studies some run is ahead in all seeds, whose interval is then above 0."""
    rng = np.random.default_rng(1)
    text = said({name: list(rng.normal(0.3, 0.05, seeds)) for name in "abcdefghi"})
    assert "No run is shown to differ from the run without a regularizer (paired t-test" in text
    assert "p < 0.05 after Holm's correction for 8 comparisons)" in text


def test_what_is_shown_is_named_whichever_way_it_went():
    base = np.array([0.30, 0.33, 0.28, 0.31])
    clear, unclear = np.array([0.10, 0.11, 0.12, 0.10]), np.array([0.1, -0.1, 0.0, 0.02])
    scores = {"base": base, "up": base + clear, "down": base - clear, "flat": base + unclear}
    text = said({name: list(values) for name, values in scores.items()})
    assert "up beats the run without a regularizer; down is worse than the run without" in text
    assert text.endswith(" No difference is shown of the other 1.")
    two = said({name: list(scores[name]) for name in ("base", "up")})
    assert two.endswith("up beats the run without a regularizer (paired t-test over seeds, "
                        "p < 0.05).")  # fmt: skip
