"""What every α schedule does over a run, plotted without training anything.

    python benchmarks/alpha_schedules.py [--out docs/alpha/schedules.png] [--steps 384]

Each schedule with its default parameters. The overlap that `dynamic` answers to is invented: it
falls evenly from 0.6 to 0.1, through the target.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from raysae.analysis.plots import DPI, plot_schedules
from raysae.training.schedules import SCHEDULES, Dynamic, trajectory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/alpha/schedules.png"))
    parser.add_argument("--steps", type=int, default=384)
    arguments = parser.parse_args()
    steps = arguments.steps
    overlap = [0.6 - 0.5 * step / max(1, steps - 1) for step in range(steps)]
    factors = {name: trajectory(schedule(), overlap) for name, schedule in SCHEDULES.items()}
    plot_schedules(factors, overlap, Dynamic().target).savefig(arguments.out, dpi=DPI)


if __name__ == "__main__":
    main()
