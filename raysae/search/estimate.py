"""How long a search will take and how much it holds, from a few seconds of measuring.

Everything here is an estimate and says so. Imports torch, and never Ray: nothing is started.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import ceil
from statistics import median
from typing import TYPE_CHECKING, Any

from raysae.config import RunConfig
from raysae.imports import imports_without_gc
from raysae.search.sizes import CorpusSize
from raysae.training.spec import TrialSpec
from raysae.worlds.presets import Shape
from raysae.worlds.world import World, hook_layer

if TYPE_CHECKING:
    from raysae.store.batches import ChunkedActivations

STEP_SECONDS = 4.0
"""For timing training steps, over all methods and sizes of the space."""
MAX_STEPS = 10
"""Timed of one method."""
FORWARDS, FORWARD_ROWS = 3, 16
"""Timed forward passes, and the sequences of one."""
LAYER_PARAMETERS = 16
"""Times d_model² in a layer of a gated transformer: 4 of attention, 12 of an MLP of 4 · d_model."""
INTERVENTIONS = 16
"""SAEBench's grid: thresholds × numbers of features × multipliers."""
QUESTIONS = 1273 + 204 + 100 + 198 + 223
"""That SAEBench asks: WMDP-bio, and the test sets of MMLU's `RETAIN_SETS`, in their order."""
KNOWN_QUESTIONS = 533 + 308
"""Of them that gemma-2-2b-it answers right in all orders, to forget and to retain; an SAE is scored
on these."""
QUESTION_TOKENS = 150
"""Of a prompt, about: the data sets' texts at 4.3 bytes a token (MMLU's history questions quote
sources, and have 300), and 40 of the frame; an estimate, as the data sets are not at hand."""
SHARED = 0.25
"""Share of the positions that the cached evaluator computes, as it finds the others equal to these;
between 0.2 and 0.3 on the embedded world.
"""
HALF = 0.5
"""Share of the questions that is asked at a rung before the end."""
START_SECONDS, IMPORTS = 8.0, 3
"""Of Ray, and how often one after the other a process of a starting search imports torch and all
that stands on it: driver, harvest, worker."""
END_SECONDS = 15.0
"""Tables and report."""


@dataclass(frozen=True)
class Estimate:
    """Seconds, and what they were made of."""

    start: float
    """Until the first worker trains, harvest included."""
    training: float
    """Of one trial that is trained to its end, mean over the methods."""
    scoring: float
    """On all questions, at the end."""
    search: float
    """Of all trials of the search, beside each other."""
    confirmation: float
    """At most."""
    measured: str
    """In words: on what, and how."""

    @property
    def total(self) -> float:
        """Everything, but the confirmation."""
        return self.start + self.search + END_SECONDS


def estimate(
    config: RunConfig,
    entry: Shape,
    world: World | None,
    size: CorpusSize | None,
    *,
    workers: int,
    trials_per_pack: int,
    workers_here: int,
    cores: int,
    harvested: bool,
) -> Estimate:
    """Time training steps of the space's methods, and a forward pass, in this process.

    Args:
        config: as from `resolve`.
        entry: of its world.
        world: None where its model is not on this machine: from counts of operations then.
        size: of the world's texts; None without a world.
        workers: of the pool.
        trials_per_pack: that one of them trains together.
        workers_here: those of them that share this machine.
        cores: of this machine.
        harvested: whether the activations are in the cache on disk.
    """
    began = time.perf_counter()
    with imports_without_gc():
        import torch

        from raysae.training.loop import stepper  # noqa: F401
        from raysae.worlds.model import load_model
    imports = time.perf_counter() - began

    threads = config.resources.threads_per_worker
    torch.set_num_threads(threads)
    device = "cuda" if config.resources.on_gpu and torch.cuda.is_available() else "cpu"
    # Workers that outnumber the cores wait for each other.
    crowd = 1.0 if device == "cuda" else max(1.0, workers_here * threads / cores)
    step = _seconds_a_step(config, entry.d_model, device, trials_per_pack)
    assert config.hook is not None
    layer = hook_layer(config.hook)
    training_tokens, seeds = config.training.batch_size, config.search.seeds_per_trial
    if world is not None and size is not None:
        model = load_model(world, device=device)
        a_layer = _seconds_a_token(model, world.seq_len, config.hook, device) / (layer + 1)
        how = "training steps and a forward pass were timed"
        sequences, seq_len, prompts = size.sequences, world.seq_len, size.prompt_tokens
    else:
        # A training step does 12 · d_in · d_sae operations a token, a layer 2 for each parameter.
        d_sae = sum(config.extremes("sae", "d_sae")) / 2
        rate = 12 * seeds * training_tokens * entry.d_model * d_sae / step
        a_layer = 2 * LAYER_PARAMETERS * entry.d_model**2 / rate
        how = (
            "training steps were timed; the model is not on this machine: its part follows from "
            "counts of operations, for corpora of 1,000 sequences of 1,024 tokens and "
            f"{KNOWN_QUESTIONS} known questions of {QUESTION_TOKENS}"
        )
        sequences, seq_len, prompts = 1000, 1024, KNOWN_QUESTIONS * QUESTION_TOKENS
    cached = config.objective.evaluator == "cached"
    # One harvesting task at a time; the evaluation cache takes as many sequences once more.
    harvest = sequences * seq_len * a_layer * (layer + 1) * (2 if cached else 1)
    harvest += prompts * a_layer * entry.n_layers
    depth = (entry.n_layers - layer - 1) * SHARED if cached else entry.n_layers
    encode = step / (6 * seeds * training_tokens)  # one of the six products of a step
    asking = seeds * INTERVENTIONS * prompts * a_layer * depth
    scoring = asking + seeds * encode * (2 * min(1024, sequences // 2) * seq_len + prompts)
    on_the_way = scoring - asking * (1 - HALF) if cached else scoring
    training = config.training.steps * step / config.resources.workers_per_trial
    groups = max(1, workers // config.resources.workers_per_trial)
    shares, early, last = expected_share(config)
    waves = max(config.num_trials / groups, ceil(min(1.0, config.num_trials / groups)))
    # Scored once, at the end, and of another number of seeds.
    confirmed = ceil(config.max_confirmation(groups) / groups) * (training + scoring)
    whole = confirmed * config.confirm.seeds_per_trial(groups) / seeds
    return Estimate(
        start=START_SECONDS + IMPORTS * imports * crowd + (0.0 if harvested else harvest),
        training=training * crowd,
        scoring=scoring * crowd,
        search=waves * (shares * training + early * on_the_way + last * scoring) * crowd,
        confirmation=whole * crowd,
        measured=f"{how} on {device} with {threads} thread{'s' if threads > 1 else ''}",
    )


def expected_share(config: RunConfig) -> tuple[float, float, float]:
    """The share of a run's tokens that a trial is trained for on average, and how often it is
    scored: on the way, where it is asked half of the questions, and at the end.

    Of the trials that reach a rung one in `reduction_factor` goes on, in the long run.
    """
    share = before = 0.0
    reached = []
    for i, tokens in enumerate(config.rungs):
        reached.append(config.search.scheduler.reduction_factor**-i)
        share += reached[-1] * (tokens - before) / config.rungs[-1]
        before = tokens
    return share, sum(reached[:-1]), reached[-1]


def _seconds_a_step(config: RunConfig, d_in: int, device: str, trials: int) -> float:
    """Of a trial, its share of one that `trials` take together.

    Mean over the space's methods at the ends of d_sae; what there is no time for counts as the
    others.
    """
    means: list[float] = []
    specs = _one_of_each(config)
    deadline = time.perf_counter() + STEP_SECONDS
    source = _synthetic(d_in, config.training.batch_size, device)
    for i, spec in enumerate(specs):
        left = deadline - time.perf_counter()
        if means and left <= 0:
            break
        share = max(0.0, left) / (len(specs) - i)
        means.append(_time_steps(spec, source, device, share, trials) / trials)
    return sum(means) / len(means)


def _one_of_each(config: RunConfig) -> list[TrialSpec]:
    """A trial of each method at each end of d_sae, those of one method beside each other."""
    specs: Iterable[TrialSpec] = config.fixed_trials()
    if config.is_search:
        assert config.space is not None
        points = (point | {"alpha": 1.0} for point in config.space.corners())
        specs = (config.trial_spec(0, point) for point in points)
    found: dict[tuple[str, int], TrialSpec] = {}
    for spec in specs:
        found.setdefault((spec.regularizer.name, spec.sae.d_sae), spec)
    return list(found.values())


def _synthetic(d_in: int, batch_size: int, device: str) -> ChunkedActivations:
    """Rows of the right shape, a third of them to forget."""
    import numpy as np

    from raysae.store.batches import ChunkedActivations

    rng = np.random.default_rng(0)
    rows = rng.standard_normal((2 * batch_size, d_in), dtype=np.float32)
    return ChunkedActivations(
        [rows],
        np.arange(len(rows)) % 3 == 0,
        scale=1.0,
        mean=np.zeros(d_in, np.float32),
        variance=float(d_in),
        device=device,
    )


def _time_steps(
    spec: TrialSpec, source: ChunkedActivations, device: str, seconds: float, trials: int
) -> float:
    """Seconds a step of so many of the trial, all their SAEs, after one that counts for nothing.

    The median: other work on the machine delays some of them by as much as ten times.
    """
    from raysae.training.loop import stepper
    from raysae.training.run import SAERun

    if spec.training.forget_share is not None:  # needs moments, and costs nothing to speak of
        spec = spec.model_copy(
            update={"training": spec.training.model_copy(update={"forget_share": None})}
        )
    together = [spec.model_copy(update={"seed": spec.seed + i}) for i in range(trials)]
    members = [member for trial in together for member in trial.members()]
    advance = stepper([SAERun(member, source, device=device) for member in members])
    advance()
    _synchronise(device)
    taken: list[float] = []
    while not taken or (len(taken) < MAX_STEPS and sum(taken) < seconds):
        taken.append(_seconds(advance, device))
    return median(taken)


def _seconds_a_token(model: Any, seq_len: int, hook: str, device: str) -> float:
    """Of one forward pass up to the hook."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (FORWARD_ROWS, min(seq_len, model.cfg.n_ctx))
    tokens = torch.randint(model.cfg.d_vocab, shape, generator=generator).to(device)

    @torch.no_grad()
    def forward() -> None:
        model(tokens, stop_at_layer=hook_layer(hook) + 1)

    _, *taken = (_seconds(forward, device) for _ in range(1 + FORWARDS))  # the first is slower
    return median(taken) / tokens.numel()


def _seconds(work: Callable[[], object], device: str) -> float:
    started = time.perf_counter()
    work()
    _synchronise(device)
    return time.perf_counter() - started


def _synchronise(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
