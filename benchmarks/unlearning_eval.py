"""What one unlearning score costs: SAEBench's own functions against the cached evaluator.

    python benchmarks/unlearning_eval.py [--threads 1] [--steps 1000] [--repeats 1]
    python benchmarks/unlearning_eval.py --device cuda [--repeats 3]
    python benchmarks/unlearning_eval.py --device cuda --model gemma-2-2b [--repeats 3]
        [--layers 5 12 19] [--forget 53] [--retain 31] [--dtype bfloat16] [--saes 1]

Same process, model, questions, corpora, SAE and threads. Each SAE is trained on the world's
corpora, then scored by both; a row says the wall-clock and processor seconds of either, the ratio
(on a CPU of the processor seconds, as a busy machine distorts the others, on a GPU of the
wall-clock), the memory that either took at its peak beyond what was held before, and whether the
score, the sparsities and all answers (16 interventions, question by question) are equal. What
SAEBench stores between SAEs (question ids, baseline) is there before its time is taken; what the
cached evaluator shares between SAEs (the cache) is timed apart.

`--repeats` are turns: the evaluators alternate, and the median counts. `--saebench-repeats` are its
turns where it takes too long for all of them; `--warm-up` is an evaluation by the cached evaluator
before the first turn, as a GPU's first products take longer (SAEBench warms up on the baseline).

Memory is the process' (Linux, VmHWM) on a CPU, what was allocated
(torch.cuda.max_memory_allocated) on a GPU; the model lies there before. Times wait for the GPU.

`--model` takes a random model of that shape, see random_gemma.py, and random SAEs at each of
`--layers`; gemma-2-tiny is the same in seconds on a CPU. Where answers differ, each is listed with
how far apart SAEBench's own two best letters are, in units of the logits' type at that size: the
evaluators round at different places.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import random_gemma
import torch
from sae_bench.evals.unlearning.eval_config import UnlearningEvalConfig
from sae_lens import SAE
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor
from transformer_lens import HookedTransformer

from raysae.training.saes import export_sae, make_training_sae
from raysae.training.spec import SAESpec
from raysae.unlearning import (
    CachedEvaluator,
    EvaluationCache,
    SAEBenchEvaluator,
    UnlearningResult,
    build_cache,
    default_eval_config,
)
from raysae.unlearning.cache import as_tensor
from raysae.worlds import World, load_world
from raysae.worlds.model import load_model

SPECS = (
    SAESpec(architecture="topk", d_sae=512, k=4),
    SAESpec(architecture="topk", d_sae=512, k=16),
    SAESpec(architecture="standard", d_sae=512, l1_coefficient=2.0),
)
HEADER = (
    "                 saebench s      cached s            peak MiB\n"
    "sae              wall    cpu    wall  cpu  ratio  theirs  ours   score  status  equal  "
    "answers  spars."
)


def train(spec: SAESpec, rows: Tensor, steps: int) -> SAE[Any]:
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


@dataclass
class Costs:
    """Of one evaluator's turns."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)
    """Bytes beyond those before the turn."""

    def measure(
        self, evaluate: Callable[..., UnlearningResult], sae: SAE[Any], on_gpu: bool
    ) -> UnlearningResult:
        """One turn more."""
        gc.collect()
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
            before = memory("VmRSS")
        started, used = time.perf_counter(), time.process_time()
        result = evaluate(sae, training_steps=1)
        if on_gpu:
            torch.cuda.synchronize()
        self.wall.append(time.perf_counter() - started)
        self.processor.append(time.process_time() - used)
        after = torch.cuda.max_memory_allocated() if on_gpu else memory("VmHWM")
        self.peak.append(after - before)
        return result


@contextmanager
def gaps(model: HookedTransformer, cache: EvaluationCache) -> Iterator[list[Tensor]]:
    """Of every question SAEBench asks in here, in units of rounding, how near its answer was.

    The distance of the two best letters' logits over the spacing of the model's type at their size.
    """
    found: list[Tensor] = []
    pad = model.tokenizer.pad_token_id  # type: ignore[union-attr]
    bits = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}[model.cfg.dtype]

    def listen(_model: Any, inputs: tuple[Tensor], logits: Tensor) -> None:
        if logits.shape[-1] != model.cfg.d_vocab:
            return  # the corpora, which stop at the hook
        last = (inputs[0] != pad).sum(dim=1) - 1
        rows = torch.arange(len(last), device=logits.device)
        letters = logits[rows, last.to(logits.device)][:, list(cache.answer_tokens)].float()
        best, second = letters.reshape(-1, 2, 4).amax(dim=1).topk(2, dim=1).values.unbind(dim=1)
        found.append((best - second) / torch.exp2(best.abs().log2().floor() - bits))

    handle = model.register_forward_hook(listen)
    try:
        yield found
    finally:
        handle.remove()


def differences(a: UnlearningResult, b: UnlearningResult) -> tuple[bool, int, int]:
    """Equal score and interventions; answers that differ; sparsities that differ."""
    same = a.score == b.score and a.interventions == b.interventions
    answers = sum(int((a.is_correct[n] != b.is_correct[n]).sum()) for n in a.is_correct)
    pairs = ((a.forget_sparsity, b.forget_sparsity), (a.retain_sparsity, b.retain_sparsity))
    return same, answers, sum(int(np.sum(x != y)) for x, y in pairs)


def explain(mine: UnlearningResult, theirs: UnlearningResult, gap: np.ndarray) -> None:
    """Print a line for each row and question of which the answers differ; gap (rows, questions)."""
    names = list(theirs.is_correct)
    differs = np.concatenate([mine.is_correct[n] != theirs.is_correct[n] for n in names], axis=1)
    turned = np.concatenate([theirs.is_correct[n] != theirs.baseline[n] for n in names], axis=1)
    where = [(name, i) for name in names for i in range(theirs.is_correct[name].shape[1])]
    print(
        f"  {turned.mean():.1%} of the answers are turned by an intervention; of all answers the "
        f"two best letters are {np.median(gap):.0f} units apart (median)"
    )
    other = [
        i
        for i, pair in enumerate(zip(mine.interventions, theirs.interventions, strict=True))
        if pair[0].features != pair[1].features
    ]
    if other:
        print(f"  other features in rows {other}")
    for row, question in np.argwhere(differs).tolist():
        name, i = where[question]
        point = theirs.interventions[row]
        print(
            f"  differs: row {row} (threshold {point.retain_threshold:g}, "
            f"{point.n_features_used} features, -{point.multiplier}), {name} {i}: SAEBench "
            f"{'right' if theirs.is_correct[name][row, i] else 'wrong'}, two best letters "
            f"{gap[row, question]:.1f} units apart"
        )


@dataclass(frozen=True)
class Subject:
    """A world, its model and SAEs at one hook."""

    world: World
    model: HookedTransformer
    config: UnlearningEvalConfig
    hook: str
    saes: Callable[[Tensor], Iterator[tuple[str, SAE[Any]]]]
    """Of the corpora's rows at the hook: (tokens, d_model)."""


def embedded(device: str, steps: int) -> Subject:
    """The embedded world at its default hook; its SAEs are trained on the CPU."""
    world = load_world("embedded")

    def saes(rows: Tensor) -> Iterator[tuple[str, SAE[Any]]]:
        for spec in SPECS:
            name = f"{spec.architecture} {spec.k or spec.l1_coefficient:g}"
            yield name, train(spec, rows, steps).to(device=torch.device(device))

    model = load_model(world, device)
    return Subject(world, model, default_eval_config(world), world.default_hook_name, saes)


def compare(subject: Subject, arguments: argparse.Namespace) -> None:
    """Print what both cost at the subject's hook."""
    world, model, config, hook = subject.world, subject.model, subject.config, subject.hook
    on_gpu = arguments.device == "cuda"
    started = time.perf_counter()
    cache = build_cache(world, model, hook, config)
    cache_seconds = time.perf_counter() - started
    fast = CachedEvaluator(world, model, cache, config)
    rows = torch.cat(
        [as_tensor(c.resid[c.counts], cache.dtype, "cpu") for c in (cache.forget, cache.retain)]
    )
    lengths = cache.prompts.lengths
    print(
        f"\nworld {world.name}, {cache.dtype}, hook {hook}, known questions "
        f"{cache.known_questions}, {lengths.min()} to {lengths.max()} tokens each (mean "
        f"{lengths.mean():.0f}); corpora {cache.forget.counts.shape} and "
        f"{cache.retain.counts.shape}"
    )
    print(f"cache: {cache_seconds:.1f} s once, {cache.nbytes / 2**20:.0f} MiB\n\n{HEADER}")
    with tempfile.TemporaryDirectory() as folder:
        slow = SAEBenchEvaluator(world, model, hook, config, Path(folder))
        slow.prepare()
        for name, sae in itertools.islice(subject.saes(rows), arguments.saes):
            ours, their = Costs(), Costs()
            if arguments.warm_up:
                fast.evaluate(sae, training_steps=1)
            for turn in range(arguments.repeats):
                mine = ours.measure(fast.evaluate, sae, on_gpu)
                if turn < arguments.saebench_repeats:
                    with gaps(model, cache) as found:
                        theirs = their.measure(slow.evaluate, sae, on_gpu)
            wall, slow_wall = statistics.median(ours.wall), statistics.median(their.wall)
            cpu, slow_cpu = statistics.median(ours.processor), statistics.median(their.processor)
            ratio = slow_wall / wall if on_gpu else slow_cpu / cpu
            equal, answers, sparsities = differences(mine, theirs)
            print(
                f"{name:14} {slow_wall:6.1f} {slow_cpu:6.1f}  {wall:6.2f} {cpu:4.1f} "
                f"{ratio:6.1f}  {max(their.peak) / 2**20:6.0f} {max(ours.peak) / 2**20:5.0f}  "
                f"{mine.score:.4f}  {mine.status:6}  {equal!s:5}  {answers:7}  {sparsities:6}",
                flush=True,
            )
            if answers or arguments.model:
                gap = torch.cat(found).reshape(len(theirs.interventions), -1)
                explain(mine, theirs, gap.cpu().numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=1, help="turns; the median time counts")
    parser.add_argument("--saebench-repeats", type=int, help="its turns, by default as many")
    parser.add_argument("--warm-up", action=argparse.BooleanOptionalAction, help="default: cuda")
    parser.add_argument("--steps", type=int, default=1000, help="training steps of 1024 rows")
    parser.add_argument("--saes", type=int, help="the first so many; by default all")
    parser.add_argument("--model", choices=tuple(random_gemma.SHAPES), help="a random one")
    parser.add_argument("--layers", type=int, nargs="+", help="of the random model")
    parser.add_argument("--dtype", default="bfloat16", help="of the random model")
    parser.add_argument("--forget", type=int, default=53, help="questions to the random model")
    parser.add_argument("--retain", type=int, default=31, help="questions to the random model")
    arguments = parser.parse_args()
    arguments.saebench_repeats = min(
        arguments.saebench_repeats or arguments.repeats, arguments.repeats
    )
    if arguments.warm_up is None:
        arguments.warm_up = arguments.device == "cuda"
    torch.set_num_threads(arguments.threads)

    started = time.perf_counter()
    packages = ("torch", "transformer-lens", "sae-lens", "sae-bench", "transformers", "numpy")
    print("  ".join(f"{name} {version(name)}" for name in packages))
    gpu = f", {torch.cuda.get_device_name()}" if arguments.device == "cuda" else ""
    print(
        f"{platform.machine()}, python {platform.python_version()}, {arguments.threads} "
        f"thread(s){gpu}"
    )
    if arguments.model is None:
        compare(embedded(arguments.device, arguments.steps), arguments)
    else:
        with tempfile.TemporaryDirectory() as folder:
            world, model = random_gemma.build(
                arguments.model,
                arguments.device,
                arguments.dtype,
                Path(folder),
                arguments.forget,
                arguments.retain,
            )
            weights = sum(weight.numel() for weight in model.parameters())
            print(f"{weights / 1e9:.2g} billion weights, {time.perf_counter() - started:.0f} s")
            for layer in arguments.layers or random_gemma.SHAPES[arguments.model].layers:
                hook = f"blocks.{layer}.hook_resid_post"
                at_layer = replace(world, default_hook_name=hook)
                config = default_eval_config(at_layer, llm_dtype=arguments.dtype)

                def saes(rows: Tensor) -> Iterator[tuple[str, SAE[Any]]]:
                    return random_gemma.saes(arguments.model, rows, model)

                compare(Subject(at_layer, model, config, hook, saes), arguments)
    print("\nanswers, sparsities: how many differ, of 16 answers a question and 2 a feature")
    print(f"{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
