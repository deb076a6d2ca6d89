"""Training throughput: packs of SAEs beside the trainers of SAELens and of other libraries.

    python benchmarks/train_throughput.py [--sizes small medium large] [--architectures topk …]
        [--members 1 4 16] [--regularizer none|NAME|all] [--threads 1] [--device cpu|cuda]
        [--dtype float32|bfloat16] [--tf32]

The peers are optional, and left out with a word where they do not import:

    pip install dictionary-learning==0.1.0 eai-sparsify==1.3.3

All contestants train on the same activations (synthetic sparse sums, in memory), batch size, dtype
(float32, with or without TF32; or bfloat16, which is PyTorch's autocast around each one's float32
parameters) and number of threads, with Adam, in one process that keeps its freed memory as the
workers do. They take turns: `--turns` times, each takes steps for `--turn-seconds`. Of the turns it
prints the median and range of the time a step takes, and the median of the CPU time, which other
work on the machine disturbs less; tokens a second follow from the CPU time on a CPU (with several
threads: over their number), from the wall time on a GPU. `aggregate` is per SAE times members.

`products` is the share of the step that its matrix products would take at the rate of a bare
product of the encoder's size, measured in the turns as well, by `torch.mm` and, where raysae takes
it, by oneDNN: the faster counts. Of n tokens 10 · n · d_in · d_sae operations, or 2 · n · d_in ·
d_sae + 8 · n · k · d_in where k features are picked.

- raysae: `Pack.advance`, regularizer included;
- SAELens: `SAETrainer.step`, and `MultiSAETrainer`'s loop over its trainers, no logging;
- dictionary_learning: its trainers' `update`, which is what its `trainSAE` calls;
- sparsify (top-k only): its `SparseCoder` and the lines of its `Trainer.fit` that follow the
  language model; on CUDA its forward pass is in bfloat16, which it decides itself.

A standard SAE starts dense, and raysae's step is faster once few features fire: `--warm-up 400`.
No feature counts as dead during a run, so that nobody's auxiliary loss is at work.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from raysae import products
from raysae.regularizers import REGISTRY
from raysae.search.cluster import WORKER_ENVIRONMENT
from raysae.training.pack import Pack
from raysae.training.run import SAERun
from raysae.training.saes import make_training_sae
from raysae.training.spec import SAESpec, TrainingSpec, TrialSpec

SIZES = {"small": (128, 512, 8), "medium": (512, 4096, 32), "large": (2304, 16384, 64)}
"""d_in, d_sae, features that fire on a token."""
ARCHITECTURES = ("standard", "topk", "batchtopk")
STEPS = 10**6  # of every schedule: nothing decays within a run
LR, L1 = 1e-3, 5.0  # L1: a dozen of 512 features fire on a token after 400 steps

Step = Callable[[], object]


@dataclass
class Setting:
    """What the contestants have in common."""

    architecture: str
    d_in: int
    d_sae: int
    k: int
    batches: list[Tensor]
    is_forget: Tensor
    device: str
    dtype: str
    tf32: bool

    @property
    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bfloat16")

    @property
    def spec(self) -> SAESpec:
        if self.architecture == "standard":
            return SAESpec(architecture="standard", d_sae=self.d_sae, l1_coefficient=L1)
        return SAESpec(architecture=self.architecture, d_sae=self.d_sae, k=self.k)

    def provider(self) -> Any:
        return itertools.cycle(self.batches)


class Source:
    """The batches as a run of raysae takes them."""

    def __init__(self, setting: Setting) -> None:
        rows = torch.cat(setting.batches)
        self.d_in, self.scale, self.mean = setting.d_in, 1.0, rows.mean(0)
        self.variance = float((rows - self.mean).pow(2).sum(1).mean())
        self._batches, self._is_forget = setting.batches, setting.is_forget

    def batch(
        self, seed: int, step: int, batch_size: int, rank: int = 0, size: int = 1
    ) -> tuple[Tensor, Tensor]:
        return self._batches[step % len(self._batches)], self._is_forget

    def batches(
        self, seeds: Sequence[int], step: int, batch_size: int, rank: int = 0, size: int = 1
    ) -> tuple[Tensor, Tensor]:
        batches, labels = zip(*(self.batch(s, step, batch_size) for s in seeds), strict=True)
        return torch.stack(batches), torch.stack(labels)

    def with_forget_share(self, forget_share: float) -> Source:
        raise ValueError("the benchmark's batches have a share of their own")

    def done_with(self, seeds: Collection[int]) -> None:
        pass


def raysae(setting: Setting, members: int, regularizer: str) -> Step:
    rows = len(setting.batches[0])
    trial = TrialSpec(
        number=0,
        seed=0,
        seeds=members,
        sae=setting.spec,
        training=TrainingSpec(
            tokens=STEPS * rows,
            batch_size=rows,
            lr=LR,
            lr_warmup=0,
            lr_decay=0,
            dead_after=STEPS,
            autocast="bfloat16" if setting.dtype == "bfloat16" else "off",
            tf32=setting.tf32,
        ),
        regularizer=REGISTRY[regularizer](),
        alpha=1.0 if REGISTRY[regularizer].uses_alpha else 0.0,
        rungs=(STEPS * rows,),
    )
    source = Source(setting)
    return Pack([SAERun(m, source, device=setting.device) for m in trial.members()]).advance


def _saelens_config(setting: Setting) -> Any:
    from sae_lens.config import SAETrainerConfig

    rows = len(setting.batches[0])
    return SAETrainerConfig(
        total_training_samples=STEPS * rows,
        train_batch_size_samples=rows,
        lr=LR,
        lr_end=LR,
        device=setting.device,
        dead_feature_window=STEPS,
        feature_sampling_window=STEPS,
        autocast=setting.dtype == "bfloat16",
    )


def _saelens_sae(setting: Setting, seed: int) -> Any:
    return make_training_sae(setting.spec, setting.d_in, seed=seed, device=setting.device)


def saelens(setting: Setting) -> Step:
    from sae_lens.training.sae_trainer import SAETrainer

    provider = setting.provider()
    trainer = SAETrainer(_saelens_config(setting), _saelens_sae(setting, 0), provider)

    def step() -> None:
        trainer.maybe_reset_sparsity()
        trainer.step(next(provider))
        trainer.n_training_steps += 1

    return step


def saelens_multi(setting: Setting, members: int) -> Step:
    from sae_lens.training.multi_sae_trainer import MultiSAETrainer

    names, provider = [str(i) for i in range(members)], setting.provider()
    multi = MultiSAETrainer(
        _saelens_config(setting),
        {name: _saelens_sae(setting, int(name)) for name in names},
        dict.fromkeys(names, "hook"),
        provider,
    )

    def step() -> None:
        multi._maybe_log_sparsity()
        batch = next(provider)
        for trainer in multi.trainers.values():
            trainer.step(batch)
            trainer.n_training_steps += 1
        multi.n_training_steps += 1

    return step


def dictionary_learning(setting: Setting) -> Step:
    trainers = importlib.import_module("dictionary_learning.trainers")
    name = {"standard": "Standard", "topk": "TopK", "batchtopk": "BatchTopK"}[setting.architecture]
    own = {"l1_penalty": L1} if name == "Standard" else {"k": setting.k}
    trainer = getattr(trainers, f"{name}Trainer")(
        steps=STEPS,
        activation_dim=setting.d_in,
        dict_size=setting.d_sae,
        layer=0,
        lm_name="",
        lr=LR,
        warmup_steps=0,
        seed=0,
        device=setting.device,
        **own,
    )
    provider, count = setting.provider(), itertools.count()

    def step() -> None:
        with setting.autocast:
            trainer.update(next(count), next(provider))

    return step


def sparsify(setting: Setting) -> Step:
    package = importlib.import_module("sparsify")
    config = package.SparseCoderConfig(num_latents=setting.d_sae, k=setting.k)
    torch.manual_seed(0)
    coder = package.SparseCoder(setting.d_in, config, setting.device, dtype=torch.float32)
    coder.b_dec.data = torch.cat(setting.batches).mean(0)
    optimizer = torch.optim.Adam(coder.parameters(), lr=LR)
    since_fired = torch.zeros(setting.d_sae, dtype=torch.long, device=setting.device)
    did_fire = torch.zeros(setting.d_sae, dtype=torch.bool, device=setting.device)
    provider = setting.provider()

    def step() -> None:
        batch = next(provider)
        coder.set_decoder_norm_to_unit_norm()
        variance = (batch - batch.mean(0)).pow(2).sum()
        with setting.autocast:
            out = coder(x=batch, y=batch, dead_mask=None, total_variance=variance)
        did_fire[out.latent_indices.flatten()] = True
        float(out.fvu.detach())
        (out.fvu + out.multi_topk_fvu / 8).backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            since_fired.add_(len(batch))
            since_fired[did_fire] = 0
            did_fire.zero_()

    return step


def bare_products(setting: Setting) -> dict[str, Step]:
    """By who makes them."""
    dtype = getattr(torch, setting.dtype)
    batches = itertools.cycle([batch.to(dtype) for batch in setting.batches])
    W = torch.randn(setting.d_in, setting.d_sae, device=setting.device, dtype=dtype)
    found: dict[str, Step] = {"torch.mm": lambda: torch.mm(next(batches), W)}
    if (setting.device, dtype, products.library()) == ("cpu", torch.float32, "onednn"):
        found["oneDNN"] = lambda: products.matmul(next(batches), W)
    return found


@dataclass
class Contestant:
    name: str
    members: int
    step: Step
    bare: bool = False
    """A product alone, and nobody's step."""
    wall: list[float] = field(default_factory=list)
    """Seconds a step, one a turn."""
    cpu: list[float] = field(default_factory=list)

    def turn(self, seconds: float, device: str) -> None:
        def wait() -> None:
            if device == "cuda":
                torch.cuda.synchronize()

        # A GPU is waited for at the end only: nobody's step is to be slowed down by the clock.
        steps = 0
        wait()
        wall, cpu = time.perf_counter(), time.process_time()
        while steps == 0 or time.perf_counter() - wall < seconds:
            self.step()
            steps += 1
        wait()
        self.wall.append((time.perf_counter() - wall) / steps)
        self.cpu.append((time.process_time() - cpu) / steps)


def contestants(setting: Setting, options: argparse.Namespace) -> list[Contestant]:
    regularizers = list(REGISTRY) if options.regularizer == "all" else [options.regularizer]
    found = [Contestant(by, 1, step, bare=True) for by, step in bare_products(setting).items()]
    for name, members in itertools.product(regularizers, options.members):
        label = "raysae" if name == "none" else f"raysae {name}"
        found.append(Contestant(label, members, raysae(setting, members, name)))
    if options.no_peers:
        return found
    found.append(Contestant("SAELens SAETrainer", 1, saelens(setting)))
    members = min((m for m in options.members if m > 1), default=2)
    found.append(Contestant("SAELens MultiSAETrainer", members, saelens_multi(setting, members)))
    for peer, make in (("dictionary_learning", dictionary_learning), ("sparsify", sparsify)):
        if make is sparsify and setting.architecture != "topk":
            continue
        try:
            importlib.import_module(peer)
        except ImportError as error:
            print(f"{peer}: not installed ({error})")
            continue
        found.append(Contestant(peer, 1, make(setting)))
    return found


def sparse_sums(size: str, rows: int, device: str) -> tuple[list[Tensor], Tensor]:
    """16 batches of sums of a few of d_sae random directions, E‖x‖² = d_in; and forget labels."""
    d_in, d_sae, k = SIZES[size]
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator))
    batches = []
    for _ in range(16):
        which = torch.randint(d_sae, (rows, k), generator=generator)
        weights = torch.rand(rows, k, generator=generator)
        batch = torch.nn.functional.embedding_bag(
            which, directions, per_sample_weights=weights, mode="sum"
        )
        batches.append((batch * (d_in / batch.pow(2).sum(1).mean()).sqrt()).to(device))
    return batches, (torch.rand(rows, generator=generator) < 0.5).to(device)


def measure(size: str, architecture: str, options: argparse.Namespace) -> None:
    d_in, d_sae, k = SIZES[size]
    batches, is_forget = sparse_sums(size, options.rows, options.device)
    units = (options.device, options.dtype, options.tf32)
    setting = Setting(architecture, d_in, d_sae, k, batches, is_forget, *units)
    print(f"\n{architecture}, {d_in} → {d_sae}, k {k}, {options.rows} rows a step", flush=True)
    found = contestants(setting, options)
    l0 = {}
    for one in found:
        for _ in range(options.warm_up):
            out = one.step()
            if isinstance(out, dict):
                l0[one.name] = float(out["fired"][0]) / options.rows
    for _ in range(options.turns):
        for one in found:
            one.turn(options.turn_seconds, options.device)
    operations = 2 * options.rows * d_in * d_sae
    needed = 5 * operations
    if architecture != "standard":
        needed = operations + 8 * options.rows * k * d_in

    def seconds(one: Contestant) -> float:
        on_cpu = options.device == "cpu"
        return statistics.median(one.cpu) / options.threads if on_cpu else median(one.wall)

    rates = {one.name: operations / seconds(one) for one in found if one.bare}
    rate = max(rates.values())
    told = ", ".join(f"{of_one / 1e9:.0f} by {name}" for name, of_one in rates.items())
    print(f"products of a batch and W_enc, Gflop/s: {told}; L0 after warm-up {l0}")
    print("| | SAEs | ms a step (range) | CPU, ms | tokens/s an SAE | aggregate | products |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for one in found:
        if one.bare:
            continue
        tokens = options.rows / seconds(one)
        wall = [1e3 * w for w in one.wall]
        share = one.members * needed / seconds(one) / rate
        print(
            f"| {one.name} | {one.members} | {median(wall):.2f} ({min(wall):.2f} to "
            f"{max(wall):.2f}) | {1e3 * median(one.cpu):.1f} | {tokens:.0f} | "
            f"{tokens * one.members:.0f} | {share:.0%} |",
            flush=True,
        )


median = statistics.median


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small", "medium"])
    parser.add_argument(
        "--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES)
    )
    parser.add_argument("--members", nargs="+", type=int, default=[1, 4, 16], help="of the packs")
    parser.add_argument("--regularizer", choices=[*REGISTRY, "all"], default="none")
    parser.add_argument("--no-peers", action="store_true", help="raysae alone")
    parser.add_argument("--rows", type=int, default=1024, help="tokens a step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--tf32", action="store_true", help="for float32 products on a GPU")
    parser.add_argument("--warm-up", type=int, default=50, help="steps before the first turn")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--turn-seconds", type=float, default=0.5)
    options = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in WORKER_ENVIRONMENT.items()):
        # glibc reads them when a process starts.
        os.execve(sys.executable, sys.orig_argv, os.environ | WORKER_ENVIRONMENT)
    if options.device == "cpu":
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = options.tf32
    where = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
    print(
        f"torch {version('torch')}, sae-lens {version('sae-lens')}, python "
        f"{platform.python_version()}, {where}, {options.threads} threads, load average "
        f"{os.getloadavg()[0]:.0f}; {options.dtype}, {'with' if options.tf32 else 'without'} TF32"
    )
    for size, architecture in itertools.product(options.sizes, options.architectures):
        measure(size, architecture, options)


if __name__ == "__main__":
    main()
