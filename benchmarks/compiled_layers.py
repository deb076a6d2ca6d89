"""What compiling the evaluator's layers is worth: the same scores with and without, in turns.

    python benchmarks/compiled_layers.py [--threads 1] [--steps 1000] [--repeats 8]
        [--pieces alike|even]

Same process, cache and SAEs. A row says the least and the median processor seconds of one score by
either, their ratio, how many of all answers differ, and by how much the process grew over its first
score by either (not the same for both: what the first one leaves the second one finds). Pieces of
few sizes, `alike`, are what evaluators make on a CPU; `even` ones have a number of rows each, for
every one of which oneDNN makes code.
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import numpy as np
import torch
from unlearning_eval import embedded, memory

from raysae.unlearning import CachedEvaluator, build_cache, compiled
from raysae.unlearning.cache import as_tensor


@contextmanager
def by_pytorch(yes: bool) -> Iterator[None]:
    """Inside, nothing is compiled, or what is."""
    before = compiled.library
    compiled.library = None if yes else before
    try:
        yield
    finally:
        compiled.library = before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1000, help="training steps of 1024 rows")
    parser.add_argument("--repeats", type=int, default=8, help="turns")
    parser.add_argument("--pieces", choices=("alike", "even"), default="alike")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if compiled.library is None:
        parser.exit(1, "nothing was compiled when raysae was installed\n")
    packages = ("torch", "sae-lens", "sae-bench", "numpy")
    print("  ".join(f"{name} {version(name)}" for name in packages))
    print(
        f"{platform.machine()}, python {platform.python_version()}, {arguments.threads} thread(s)\n"
    )
    subject = embedded("cpu", arguments.steps)
    cache = build_cache(subject.world, subject.model, subject.hook, subject.config)
    evaluators = {}
    for name in ("PyTorch", "compiled"):
        with by_pytorch(name == "PyTorch"):
            evaluators[name] = CachedEvaluator(subject.world, subject.model, cache, subject.config)
        evaluators[name].pieces_alike = arguments.pieces == "alike"
    corpora = (cache.forget, cache.retain)
    rows = torch.cat([as_tensor(c.resid[c.counts], cache.dtype, "cpu") for c in corpora])

    print("                  PyTorch, s        compiled, s")
    print("sae              least  median     least  median   ratio (medians)  differ   MiB grown")
    for label, sae in subject.saes(rows):
        seconds: dict[str, list[float]] = {name: [] for name in evaluators}
        answers, grown = {}, {}
        for turn in range(arguments.repeats):
            for name, evaluator in evaluators.items():
                gc.collect()
                before = memory("VmRSS")
                started = time.process_time()
                with by_pytorch(name == "PyTorch"):
                    answers[name] = evaluator.evaluate(sae, training_steps=1).is_correct
                seconds[name].append(time.process_time() - started)
                if not turn:
                    grown[name] = (memory("VmRSS") - before) >> 20
        ours, theirs = answers["compiled"], answers["PyTorch"]
        differ = sum(np.count_nonzero(ours[name] != theirs[name]) for name in ours)
        least = {name: min(times) for name, times in seconds.items()}
        median = {name: statistics.median(times) for name, times in seconds.items()}
        ratio = least["PyTorch"] / least["compiled"]
        print(
            f"{label:<16} {least['PyTorch']:5.2f}   {median['PyTorch']:5.2f}     "
            f"{least['compiled']:5.2f}   {median['compiled']:5.2f}   {ratio:5.2f} "
            f"({median['PyTorch'] / median['compiled']:.2f})     {differ:6d}   "
            f"{grown['PyTorch']}, {grown['compiled']}",
            flush=True,
        )


if __name__ == "__main__":
    main()
