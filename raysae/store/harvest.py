"""Harvest the residual stream once, by Ray tasks, into read-only chunks of the object store.

A chunk is what one task returns: a numpy array that every process of a node reads from shared
memory without a copy. Task-made objects can be rebuilt by Ray when a node is lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import ray
from ray import ObjectRef

from raysae.imports import imports_without_gc
from raysae.store.batches import CORPORA, ChunkedActivations, StoreDtype, add_up

SEQUENCES_PER_CHUNK = 512
TASK_CPUS = 0.9
"""One task at a time on the CPU kept free for the harvest, beside the trials' tiny shares of it."""


@dataclass(frozen=True)
class StoreHandle:
    """References to everything that is computed once per search and read by every worker."""

    chunks: tuple[ObjectRef, ...]  # activations (rows, d_in): float32, or int16 holding bfloat16
    is_forget: np.ndarray  # bool (rows,), over all chunks
    evaluation_cache: ObjectRef | None  # raysae.unlearning.EvaluationCache
    rows: int
    bytes: int
    scale: float  # √d_in / E‖x‖
    mean: np.ndarray  # (d_in,) raw units
    variance: float  # E‖x − mean‖², raw units

    def open(self, device: str = "cpu") -> ChunkedActivations:
        """Batches over the shared chunks, in the calling process."""
        return ChunkedActivations(
            ray.get(list(self.chunks)),
            self.is_forget,
            scale=self.scale,
            mean=self.mean,
            variance=self.variance,
            device=device,
        )


def harvest(
    world_name: str,
    hook_name: str,
    dtype: StoreDtype,
    *,
    evaluation_cache: bool,
    tasks_at_a_time: int = 1,
) -> tuple[StoreHandle, ObjectRef | None]:
    """Submit the harvest tasks, wait for the activations, and return the store's handle.

    The evaluation cache may still be on its way, so that training begins without it. The second
    value is there when the cache is, and raises what its task raised; None without a cache.

    Args:
        world_name: as in `raysae.worlds.load_world`.
        hook_name: e.g. "blocks.0.hook_resid_post".
        dtype: of the chunks.
        evaluation_cache: whether to compute what the cached evaluator needs, too.
        tasks_at_a_time: no more, or they would take the CPUs that the starting pool waits for.
    """
    lengths = ray.get(_count_sequences.remote(world_name))
    pieces = [
        (name, start, min(start + SEQUENCES_PER_CHUNK, lengths[name]))
        for name in CORPORA
        for start in range(0, lengths[name], SEQUENCES_PER_CHUNK)
    ]
    task = _harvest_chunk.options(num_returns=2)
    returns: list[Any] = []
    for piece in pieces:
        running = [refs[1] for refs in returns]
        if len(running) >= tasks_at_a_time:
            ray.wait(running, num_returns=len(running) - tasks_at_a_time + 1)
        returns.append(task.remote(world_name, hook_name, *piece, dtype))
    ready = cache = None
    if evaluation_cache:
        refs: Any = _evaluation_cache.options(num_returns=2).remote(world_name, hook_name)
        ready, cache = refs
    sums = ray.get([refs[1] for refs in returns])
    labels = [name == "forget" for name, _, _ in pieces]
    handle = StoreHandle(
        chunks=tuple(refs[0] for refs in returns),
        is_forget=np.repeat(labels, [part["rows"] for part in sums]),
        evaluation_cache=cache,
        **add_up(sums),
    )
    return handle, ready


@lru_cache(maxsize=1)
def _model_and_tokens(world_name: str) -> tuple[Any, dict[str, np.ndarray]]:
    """Model and tokens, kept by the worker process so that its next task starts at once."""
    with imports_without_gc():
        import torch

        from raysae.store.activations import corpus_tokens
        from raysae.worlds import load_world
        from raysae.worlds.model import load_model

    torch.set_num_threads(1)
    world = load_world(world_name)
    model = load_model(world)
    return model, corpus_tokens(world, model)


@ray.remote(num_cpus=TASK_CPUS)
def _count_sequences(world_name: str) -> dict[str, int]:
    """Number of sequences of each corpus."""
    return {name: len(tokens) for name, tokens in _model_and_tokens(world_name)[1].items()}


@ray.remote(num_cpus=TASK_CPUS)
def _harvest_chunk(
    world_name: str, hook_name: str, corpus: str, start: int, stop: int, dtype: StoreDtype
) -> tuple[np.ndarray, dict[str, Any]]:
    """One chunk of activations, and its sums."""
    from raysae.store.activations import harvest_chunk

    model, tokens = _model_and_tokens(world_name)
    return harvest_chunk(model, tokens[corpus][start:stop], hook_name, dtype)


@ray.remote(num_cpus=TASK_CPUS)
def _evaluation_cache(world_name: str, hook_name: str) -> tuple[bool, Any]:
    """True, and what scoring needs and does not depend on the SAE; see `raysae.unlearning`."""
    from raysae.unlearning import build_cache, default_eval_config
    from raysae.worlds import load_world

    model, _ = _model_and_tokens(world_name)
    world = load_world(world_name)
    return True, build_cache(world, model, hook_name, default_eval_config(world))
