"""p values of studies of which the tables alone are left, as docs/seed_study.md and docs/alpha.md.

    python benchmarks/p_of_tables.py docs/alpha.md docs/seed_study.md [--questions 240]

A table of `benchmarks/study_table.py` as it was before it had p: mean difference, its bootstrap
interval, and in how many seeds it is above 0. A score is a count of so many held-out questions, so
that the differences by seed are whole multiples of 1/questions; of those that agree with the table
(of three seeds there is one set, of five some are drawn) the smallest and largest p are printed,
with and without Holm's correction for the table's runs.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np

from raysae.analysis.statistics import bootstrap_interval, holm, p_of_mean

ROW = re.compile(r"\| ([^|]+) \|.*?\| ([+-][\d.]+) \[([+-][\d.]+), ([+-][\d.]+)\] \| (\d+)/(\d+) ")
ROUNDING = 0.0006
DRAWS, CHECKED = 600_000, 2000


def candidates(difference: float, low: float, high: float, seeds: int, n: int) -> np.ndarray:
    """Differences by seed, in questions (sets, seeds), of about the mean and spread of a row."""
    rng = np.random.default_rng(0)
    spread = (high - low) / 3.92 * seeds / np.sqrt(seeds - 1)  # of a resample's mean to the seeds'
    if seeds == 3:  # the interval is from the smallest to the largest
        ends = np.rint(np.array([low, high]) * n)
        sets = np.array([[ends[0], middle, ends[1]] for middle in np.arange(ends[0], ends[1] + 1)])
    else:
        wide = spread * rng.uniform(0.6, 1.6, (DRAWS, 1))
        sets = np.unique(np.rint(rng.normal(difference, wide, (DRAWS, seeds)) * n), axis=0)
        near = abs(sets.std(axis=1, ddof=1) / n / spread - 1) < 0.25
        sets = rng.permutation(sets[near])
    return sets[abs(sets.mean(axis=1) / n - difference) <= ROUNDING]


def p_range(row: re.Match[str], n: int) -> tuple[float, float]:
    """Smallest and largest p of what agrees with a row."""
    difference, low, high = map(float, row.groups()[1:4])
    ahead, seeds = int(row[5]), int(row[6])
    sets = candidates(difference, low, high, seeds, n) / n
    sets = sets[(sets > 0).sum(axis=1) == ahead][:CHECKED]
    agree = [
        p_of_mean(one) for one in sets
        if np.allclose(bootstrap_interval(one), (low, high), rtol=0, atol=ROUNDING)
    ]  # fmt: skip
    return (min(agree), max(agree)) if agree else (np.nan, np.nan)


def main() -> None:
    """Print a table a file; rows that are 0 throughout are left out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--questions", type=int, default=240)
    arguments = parser.parse_args()
    for path in arguments.files:
        found = filter(None, map(ROW.match, path.read_text(encoding="utf-8").splitlines()))
        rows = [row for row in found if row[3] != row[4]]
        p = np.array([p_range(row, arguments.questions) for row in rows])
        # One for which no set was drawn is a comparison all the same.
        corrected = np.column_stack([holm(np.nan_to_num(side, nan=1.0)) for side in p.T])
        print(f"{path}\n| run | p | Holm |\n| --- | --- | --- |")
        for row, one, other in zip(rows, p, corrected, strict=True):
            cells = [f"{a:.2g}" if f"{a:.2g}" == f"{b:.2g}" else f"{a:.2g} to {b:.2g}"
                     for a, b in (one, other)]  # fmt: skip
            print(f"| {row[1].strip()} | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    main()
