"""How often a confirmation says "beats" where no method does anything, with and without Holm.

    python benchmarks/verdicts_by_chance.py [--repeats 2000]

Scores of candidates and baselines are drawn alike: a seed's share (candidate and baseline of a seed
have their batches in common) and a share of its own, rounded to so many questions. Candidates share
their baselines, as in a confirmation of equal budgets, and the verdicts are those of
`raysae.analysis.confirmation.judge`.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from raysae.analysis.confirmation import judge
from raysae.analysis.statistics import SIGNIFICANT, bootstrap_interval, p_of_mean

CASES = ((1, 8), (2, 3), (5, 5))
"""Candidates and seeds: of the default space, of gemma-2-2b, and more."""
BASELINES, QUESTIONS, SPREAD = 2, 240, 0.06


def confirmation(rng: np.random.Generator, candidates: int, seeds: int) -> list[dict[str, Any]]:
    """The rows of a confirmation in which nothing has an effect."""
    shared = rng.normal(0.35, SPREAD / 2**0.5, seeds)
    own = rng.normal(0, SPREAD / 2**0.5, (candidates + BASELINES, seeds))
    scores = np.rint((shared + own) * QUESTIONS) / QUESTIONS
    rows = []
    for candidate in scores[:candidates]:
        for baseline in scores[candidates:]:
            low, high = bootstrap_interval(candidate - baseline)
            rows.append({"low": low, "high": high, "p": p_of_mean(candidate - baseline)})
    judge(rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=2000)
    repeats = parser.parse_args().repeats
    print("| candidates | seeds | any beats, Holm | any beats, each by itself |\n|" + " --- |" * 4)
    for candidates, seeds in CASES:
        rng = np.random.default_rng(0)
        found = [confirmation(rng, candidates, seeds) for _ in range(repeats)]
        corrected = np.mean([any(row["beats"] for row in rows) for rows in found])
        alone = np.mean(
            [any(row["low"] > 0 and row["p"] < SIGNIFICANT for row in rows) for rows in found]
        )
        print(f"| {candidates} | {seeds} | {corrected:.1%} | {alone:.1%} |", flush=True)


if __name__ == "__main__":
    main()
