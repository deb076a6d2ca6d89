"""`--plan`: what a search will do and need, before anything is started or fetched."""

from __future__ import annotations

import os
import subprocess

from raysae.config import RunConfig
from raysae.search.cards import on_cards
from raysae.worlds.presets import shape_of


def describe_plan(config: RunConfig) -> list[str]:
    """The plan in lines: trials, model, training, memory, machine. `config` as from `resolve`."""
    entry, training, resources = shape_of(config.world), config.training, config.resources
    assert config.hook is not None
    layer = int(config.hook.split(".")[1])
    confirmation = config.max_confirmation
    trials = config.fixed_trials()
    names = list(dict.fromkeys(spec.run for spec in trials))
    what = (
        f"{config.num_trials} trials chosen by {config.search.sampler}"
        + (f", then at most {confirmation} to confirm the best" if confirmation else "")
        if config.is_search
        else f"{len(trials)} trials: {len(names)} runs with {config.search.seeds} seeds each"
    )
    element = 2 if resources.store_dtype == "bfloat16" else 4
    d_sae = config.sae.d_sae
    # Forward and backward of encoder and decoder: three times two products of tokens·d_in·d_sae.
    operations = 12 * training.tokens * entry.d_model * d_sae
    lines = [
        f"search       {what}",
        *(f"               {name}" for name in names),
        f"model        {entry.label}: {entry.n_layers} layers, d_in {entry.d_model}; SAEs at "
        f"{config.hook}, {layer + 1} of {entry.n_layers} layers are run for activations",
        f"SAE          {config.sae.architecture}, d_sae {d_sae}, "
        f"{2 * entry.d_model * d_sae + entry.d_model + d_sae:,} parameters",
        f"training     {training.tokens:,} tokens a trial: {training.steps:,} steps of "
        f"{training.batch_size}; {operations:.2e} operations a trial without the penalty",
        f"scored at    {', '.join(f'{tokens:,}' for tokens in config.rungs)} tokens",
        f"store        {element * entry.d_model:,} bytes a token of the corpora "
        f"({resources.store_dtype})",
        f"workers      {resources.workers or ('one a GPU' if resources.use_gpu else 'one a core')}"
        f", {resources.workers_per_trial} a trial, {resources.threads_per_worker} threads each",
        *on_cards(config, entry),
        f"this machine {len(os.sched_getaffinity(0))} cores, {_gpus()}",
    ]
    if resources.use_gpu and _gpus() == "no GPU":
        lines.append("             resources.use_gpu is set: run it where a GPU is, or join one "
                     "with --address")  # fmt: skip
    return lines


def _gpus() -> str:
    """The GPUs that the driver lists, without importing torch."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "no GPU"
    return ", ".join(done.stdout.split("\n")).strip(", ") or "no GPU"
