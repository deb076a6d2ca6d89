"""How many SAEs a worker has memory for, and how many trials it trains together."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from raysae.config import RunConfig
from raysae.resources import MOST_TRIALS
from raysae.search.sizes import element_size
from raysae.store.tiers import DEVICE_SHARE, human
from raysae.worlds.presets import parameters_of, shape_of
from raysae.worlds.world import World

SAE_COPIES = 4
"""Weights, gradients and Adam's two moments."""
SOFT_CAP_COPIES = 3
"""Of logits, where a model caps them: before it, within it and after."""
BATCH_COPIES = 6
"""Of the features of a batch, forward and backward; a penalty adds products of d_sae²."""


@dataclass(frozen=True)
class SAEMemory:
    """Bytes that one SAE takes on a worker while it is trained."""

    weights: int
    """Once, as in its file."""
    batch: int
    """Activations of a batch, forward and backward."""

    @property
    def total(self) -> int:
        """Weights, gradients, Adam's moments, activations."""
        return SAE_COPIES * self.weights + self.batch


def memory_of_sae(config: RunConfig) -> SAEMemory:
    """Of the largest SAE of the search, in float32."""
    d_in, d_sae = shape_of(config.world).d_model, config.extremes("sae", "d_sae")[1]
    batch_size = config.extremes("training", "batch_size")[1]
    return SAEMemory(
        weights=4 * (2 * d_in * d_sae + d_in + d_sae),
        batch=BATCH_COPIES * 4 * batch_size * (d_in + d_sae),
    )


def most_seeds(config: RunConfig) -> int:
    """SAEs of the largest trial, the confirmation's included where one group trains it alone."""
    return max(config.search.seeds_per_trial, config.confirm.seeds if config.is_search else 1)


def model_bytes(world: World | None) -> int:
    """Of the language model in memory, by its files' headers and the type that it runs in."""
    parameters = 0
    for path in () if world is None else world.model_path.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                parameters += math.prod(tensor["shape"])
    return 0 if world is None else element_size(world.dtype) * parameters


def model_memory(config: RunConfig, world: World | None) -> int | None:
    """`model_bytes`, by the number of its parameters where it is not on this machine; None: that is
    not known either."""
    if world is not None:
        return model_bytes(world)
    known = parameters_of(config.world)
    return None if known is None else element_size(known[1]) * known[0]


def logits_bytes(world: World, longest_prompt: int) -> int:
    """Of a batch of questions as SAEBench asks them: a number for every word at every position."""
    model = json.loads((world.model_path / "config.json").read_text(encoding="utf-8"))
    copies = SOFT_CAP_COPIES if model.get("final_logit_softcapping") else 1
    questions = 2 * world.llm_batch_size
    numbers = questions * longest_prompt * int(model["vocab_size"])
    return copies * element_size(world.dtype) * numbers


def room_on_gpu(free: int, model: int, workers: int = 1) -> int:
    """Bytes of a GPU that a worker has left for SAEs: a copy of the activations may take its share.

    Args:
        free: bytes that nobody holds yet.
        model: bytes of the language model, which each worker has for itself.
        workers: on the GPU; the copy of the activations is theirs together.
    """
    return max(0, int((1 - DEVICE_SHARE) * free) // workers - model)


def trials_that_fit(config: RunConfig, room: int) -> int:
    """Trials whose SAEs have room in so many bytes beside each other."""
    penalty = 4 * config.extremes("sae", "d_sae")[1] ** 2
    return max(0, room - penalty) // (most_seeds(config) * memory_of_sae(config).total)


def trials_per_pack(config: RunConfig, room: int | None) -> int:
    """Trials that a worker trains together: as set, or what `auto` stands for.

    Args:
        config: of the search.
        room: bytes of a GPU for SAEs; None where there is none, or it is not known.
    """
    resources = config.resources
    if resources.trials_per_pack != "auto":
        return resources.trials_per_pack
    if room is None or resources.workers_per_trial > 1:
        return 1
    return max(1, min(MOST_TRIALS, trials_that_fit(config, room)))


def describe_pack(config: RunConfig, trials: int, room: int | None) -> str:
    """What fits and what is used, in words.

    Args:
        config: of the search.
        trials: that a worker trains together.
        room: bytes for SAEs on a worker; None: not known.
    """
    sae, seeds = memory_of_sae(config), config.search.seeds_per_trial
    fit = "its memory is not known here"
    if room is not None:
        count = trials_that_fit(config, room) * most_seeds(config)
        fit = f"{human(room)} have room for {count:,}"
    return (
        f"{_count(trials * seeds, 'SAE')} trained together by a worker: {_count(trials, 'trial')} "
        f"of {_count(seeds, 'seed')}; {human(sae.total)} each (weights, gradients, Adam's moments "
        f"{human(SAE_COPIES * sae.weights)}, activations {human(sae.batch)}); {fit}"
    )


def _count(n: int, word: str) -> str:
    return f"{n} {word}{'s' if n > 1 else ''}"
