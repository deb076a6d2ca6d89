"""What one unlearning score costs: SAEBench's own functions against the cached evaluator.

    python benchmarks/unlearning_eval.py [--threads 1] [--steps 1000] [--repeats 1]

Same process, model, questions, corpora, SAE and threads. Each SAE is trained on the world's
corpora, then scored by both; a row says the wall-clock and processor seconds of either, the ratio
of the processor seconds (a busy machine distorts the others), the memory that either took at its
peak beyond what the process held before (Linux), and whether the score, the sparsities and all
answers (16 interventions, question by question) are equal. What SAEBench stores between SAEs
(question ids, baseline) is there before its time is taken; what the cached evaluator shares between
SAEs (the cache) is timed apart.
"""

from __future__ import annotations

import argparse
import gc
import platform
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens import SAE
from sae_lens.saes.sae import TrainStepInput

from raysae.training.saes import export_sae, make_training_sae
from raysae.training.spec import SAESpec
from raysae.unlearning import (
    CachedEvaluator,
    SAEBenchEvaluator,
    UnlearningResult,
    build_cache,
    default_eval_config,
)
from raysae.worlds import load_world
from raysae.worlds.model import load_model

SPECS = (
    SAESpec(architecture="topk", d_sae=512, k=4),
    SAESpec(architecture="topk", d_sae=512, k=16),
    SAESpec(architecture="standard", d_sae=512, l1_coefficient=2.0),
)


def train(spec: SAESpec, rows: torch.Tensor, steps: int) -> SAE[Any]:
    """A plain SAELens loop, `steps` times 1024 of `rows` (tokens, d_model); in raw units."""
    scale = float(rows.shape[1] ** 0.5 / rows.norm(dim=1).mean())
    sae = make_training_sae(spec, rows.shape[1], seed=0, b_dec=rows.mean(0) * scale)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    never_dead = torch.zeros(spec.d_sae, dtype=torch.bool)
    coefficients = {"l1": spec.l1_coefficient or 0.0}
    for step in range(steps):
        batch = rows[torch.randint(len(rows), (1024,), generator=generator)] * scale
        loss = sae.training_forward_pass(
            TrainStepInput(batch, coefficients, never_dead, step, False)
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return export_sae(sae, scale)


def memory(kind: str) -> int:
    """Bytes the process holds, now (``VmRSS``) or at most since the last reset (``VmHWM``)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {kind}")


def timed(
    evaluate: Callable[..., UnlearningResult], sae: SAE[Any], steps: int, repeats: int
) -> tuple[float, float, int, UnlearningResult]:
    """Of `repeats` evaluations the least wall-clock and processor seconds, the bytes at the peak
    beyond those before, and the result.
    """
    wall, processor = [], []
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = memory("VmRSS")
    for _ in range(repeats):
        started, used = time.perf_counter(), time.process_time()
        result = evaluate(sae, training_steps=steps)
        wall.append(time.perf_counter() - started)
        processor.append(time.process_time() - used)
    return min(wall), min(processor), memory("VmHWM") - before, result


def differences(a: UnlearningResult, b: UnlearningResult) -> tuple[bool, int, int]:
    """Equal score and interventions; answers that differ; sparsities that differ."""
    same = a.score == b.score and a.interventions == b.interventions
    answers = sum(int((a.is_correct[n] != b.is_correct[n]).sum()) for n in a.is_correct)
    pairs = ((a.forget_sparsity, b.forget_sparsity), (a.retain_sparsity, b.retain_sparsity))
    return same, answers, sum(int(np.sum(x != y)) for x, y in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1000, help="training steps of 1024 rows")
    parser.add_argument("--repeats", type=int, default=1, help="of each evaluation; least time")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    world = load_world("embedded")
    model, config = load_model(world), default_eval_config(world)
    hook = world.default_hook_name
    started = time.perf_counter()
    cache = build_cache(world, model, hook, config)
    cache_seconds = time.perf_counter() - started
    fast = CachedEvaluator(world, model, cache, config)
    rows = torch.cat(
        [torch.from_numpy(corpus.resid[corpus.counts]) for corpus in (cache.forget, cache.retain)]
    )
    packages = ("torch", "transformer-lens", "sae-lens", "sae-bench", "numpy")
    print("  ".join(f"{name} {version(name)}" for name in packages))
    print(
        f"{platform.machine()}, python {platform.python_version()}, {arguments.threads} thread(s)"
    )
    print(f"world {world.name}, hook {hook}, known questions {cache.known_questions}")
    print(f"cache: {cache_seconds:.1f} s once, {cache.nbytes / 2**20:.0f} MiB\n")
    print("                 saebench s      cached s          peak MiB")
    print(
        "sae              wall    cpu    wall  cpu  ratio  theirs ours   score  status  equal  "
        "answers  spars."
    )
    with tempfile.TemporaryDirectory() as folder:
        slow = SAEBenchEvaluator(world, model, hook, config, Path(folder))
        slow.prepare()
        for spec in SPECS:
            sae = train(spec, rows, arguments.steps)
            wall, cpu, peak, mine = timed(fast.evaluate, sae, arguments.steps, arguments.repeats)
            slow_wall, slow_cpu, slow_peak, theirs = timed(
                slow.evaluate, sae, arguments.steps, arguments.repeats
            )
            equal, answers, sparsities = differences(mine, theirs)
            name = f"{spec.architecture} {spec.k or spec.l1_coefficient:g}"
            print(
                f"{name:14} {slow_wall:6.1f} {slow_cpu:6.1f}  {wall:6.1f} {cpu:4.1f} "
                f"{slow_cpu / cpu:6.1f}  {slow_peak / 2**20:6.0f} {peak / 2**20:4.0f}  "
                f"{mine.score:.4f}  {mine.status:6}  {equal!s:5}  "
                f"{answers:7}  {sparsities:6}",
                flush=True,
            )
    print("\nanswers, sparsities: how many differ, of 16 answers a question and 2 a feature")


if __name__ == "__main__":
    main()
