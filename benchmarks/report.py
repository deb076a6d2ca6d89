"""What a report takes: seconds and bytes, for made-up searches of 24 and 1,000 trials.

    python benchmarks/report.py [--trials 24 1000]

The runs are made by `tests/report/synthetic_runs.py` through the code that writes real ones.
Seconds are of `build_report` alone, which is imported before; CPU seconds are of this process.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "report"))

from synthetic_runs import write_search

from raysae.report.build import build_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, nargs="+", default=[24, 1000])
    sizes = parser.parse_args().trials
    print("| trials | wall, s | CPU, s | report.html, MB | figures, MB |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as scratch:
        for trials in sizes:
            folder = write_search(Path(scratch) / str(trials), trials)
            cpu = time.process_time()
            report = build_report(folder)
            cpu = time.process_time() - cpu
            figures = sum(path.stat().st_size for path in (folder / "figures").iterdir())
            size = report.path.stat().st_size
            print(
                f"| {trials} | {report.seconds:.1f} | {cpu:.1f} | {size / 1e6:.1f} | "
                f"{figures / 1e6:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
