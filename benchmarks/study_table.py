"""A study's table as Markdown, from its run folder.

python benchmarks/study_table.py RUN_DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from raysae.analysis.runs import runs_table

COLUMNS = (
    "run", "score", "held-out", "− baseline, held-out", "ahead", "p (Holm)", "SAEBench", "L2 loss",
    "sparsity", "total loss", "L0", "EV", "dead", "κ", "steps", "why 0",
)  # fmt: skip


def cells(row: pd.Series) -> list[str]:
    """One run's cells, means with standard deviations over seeds."""

    def spread(figure: str, digits: int) -> str:
        deviation = row[f"{figure}_std"]
        shown = "" if pd.isna(deviation) else f" ± {deviation:.{digits}f}"
        return f"{row[figure]:.{digits}f}{shown}"

    difference = ahead = p = ""
    if not pd.isna(row.get("difference")):
        low, high = row["difference_low"], row["difference_high"]
        interval = "" if pd.isna(low) else f" [{low:+.3f}, {high:+.3f}]"
        difference = f"{row['difference']:+.3f}{interval}"
        ahead = f"{row['ahead']:.0f}/{row['seeds']}"
        p = f"{row['p']:.2g} ({row['p_holm']:.2g})"
    return [
        str(row["run"]),
        spread("score", 3),
        spread("heldout_score", 3),
        difference,
        ahead,
        p,
        spread("saebench_score", 3),
        spread("l2_loss", 2),
        spread("sparsity_loss", 2),
        spread("loss", 2),
        spread("l0", 1),
        f"{row['explained_variance']:.3f}",
        f"{row['dead_features']:.0f}",
        f"{row['condition_number']:.2f}",
        f"{row['training_steps']}",
        str(row["zeros"]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path)
    arguments = parser.parse_args()
    table = runs_table(pd.read_parquet(arguments.run_dir / "seeds.parquet"))
    print(f"| {' | '.join(COLUMNS)} |")
    print("|" + " --- |" * len(COLUMNS))
    for _, row in table.iterrows():
        print(f"| {' | '.join(cells(row))} |")


if __name__ == "__main__":
    main()
