"""Harvest the residual stream once, by Ray tasks, into read-only chunks of the object store.

A chunk is what one task returns: a numpy array that every process of a node reads from shared
memory without a copy. Task-made objects can be rebuilt by Ray when a node is lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import ray
from ray import ObjectRef

from raysae.store.batches import ChunkedActivations

StoreDtype = Literal["float32", "bfloat16"]
SEQUENCES_PER_CHUNK = 512
TASK_CPUS = 0.9
"""One task at a time on the CPU kept free for the harvest, beside the trials' tiny shares of it."""


@dataclass(frozen=True)
class StoreHandle:
    """References to everything that is computed once per search and read by every worker."""

    chunks: tuple[ObjectRef, ...]  # activations (rows, d_in): float32, or int16 holding bfloat16
    labels: tuple[ObjectRef, ...]  # is_forget (rows,) bool, one per chunk
    evaluation_cache: ObjectRef | None  # raysae.unlearning.EvaluationCache
    rows: int
    rows_forget: int
    d_in: int
    bytes: int
    scale: float  # √d_in / E‖x‖
    mean: np.ndarray  # (d_in,) raw units
    variance: float  # E‖x − mean‖², raw units

    def open(self, device: str = "cpu") -> ChunkedActivations:
        """Batches over the shared chunks, in the calling process."""
        return ChunkedActivations(
            ray.get(list(self.chunks)),
            np.concatenate(ray.get(list(self.labels))),
            scale=self.scale,
            mean=self.mean,
            variance=self.variance,
            device=device,
        )


def harvest(
    world_name: str, hook_name: str, dtype: StoreDtype, *, evaluation_cache: bool
) -> StoreHandle:
    """Submit the harvest tasks, wait for them, and return the store's handle.

    Args:
        world_name: as in `raysae.worlds.load_world`.
        hook_name: e.g. "blocks.0.hook_resid_post".
        dtype: of the chunks.
        evaluation_cache: whether to compute what the cached evaluator needs, too.
    """
    shapes = ray.get(_tokenise.remote(world_name))
    parts = [
        _harvest_chunk.options(num_returns=3).remote(
            world_name, hook_name, corpus, start, min(start + SEQUENCES_PER_CHUNK, total), dtype
        )
        for corpus, total in shapes.items()
        for start in range(0, total, SEQUENCES_PER_CHUNK)
    ]
    cache = ready = None
    if evaluation_cache:
        ready, cache = _evaluation_cache.options(num_returns=2).remote(world_name, hook_name)
    chunks, labels, sums = zip(*parts, strict=True)
    totals: dict[str, Any] = {}
    for part in ray.get(list(sums)):
        totals = {key: totals.get(key, 0) + value for key, value in part.items()}
    if ready is not None:
        ray.get(ready)  # raises what the task raised, without fetching the cache itself
    rows = totals["rows"]
    mean = totals["x"] / rows
    return StoreHandle(
        chunks=tuple(chunks),
        labels=tuple(labels),
        evaluation_cache=cache,
        rows=int(rows),
        rows_forget=int(totals["forget"]),
        d_in=len(mean),
        bytes=int(totals["bytes"]),
        scale=float(len(mean) ** 0.5 / (totals["norm"] / rows)),
        mean=mean.astype(np.float32),
        variance=float(totals["norm2"] / rows - (mean**2).sum()),
    )


@lru_cache(maxsize=1)
def _model_and_tokens(world_name: str) -> tuple[Any, dict[str, np.ndarray]]:
    """Model and tokens, kept by the worker process so that its next task starts at once."""
    import torch
    from sae_bench.sae_bench_utils.dataset_utils import tokenize_and_concat_dataset

    from raysae.worlds import load_world
    from raysae.worlds.model import load_model

    torch.set_num_threads(1)
    world = load_world(world_name)
    model = load_model(world)
    corpora = {"forget": world.forget_texts, "retain": world.retain_texts}
    tokens = {
        name: tokenize_and_concat_dataset(model.tokenizer, list(texts), world.seq_len).numpy()
        for name, texts in corpora.items()
    }
    return model, tokens


@ray.remote(num_cpus=TASK_CPUS)
def _tokenise(world_name: str) -> dict[str, int]:
    """Number of sequences of each corpus."""
    return {name: len(tokens) for name, tokens in _model_and_tokens(world_name)[1].items()}


@ray.remote(num_cpus=TASK_CPUS)
def _harvest_chunk(
    world_name: str, hook_name: str, corpus: str, start: int, stop: int, dtype: StoreDtype
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Activations, labels, and float64 sums of one chunk: BOS, PAD and EOS are left out."""
    import torch
    from sae_bench.sae_bench_utils.activation_collection import get_bos_pad_eos_mask

    from raysae.worlds.world import hook_layer

    model, tokens = _model_and_tokens(world_name)
    rows = []
    with torch.no_grad():
        for batch in torch.from_numpy(tokens[corpus][start:stop]).split(64):
            _, cache = model.run_with_cache(
                batch, stop_at_layer=hook_layer(hook_name) + 1, names_filter=hook_name
            )
            rows.append(cache[hook_name][get_bos_pad_eos_mask(batch, model.tokenizer)])
    acts = torch.cat(rows)
    exact = acts.double()
    sums = {
        "rows": len(acts),
        "forget": len(acts) if corpus == "forget" else 0,
        "x": exact.sum(0).numpy(),
        "norm": float(exact.norm(dim=1).sum()),
        "norm2": float(exact.pow(2).sum()),
    }
    if dtype == "bfloat16":
        chunk = acts.to(torch.bfloat16).view(torch.int16).numpy()
    else:
        chunk = acts.float().numpy()
    sums["bytes"] = chunk.nbytes
    return chunk, np.full(len(acts), corpus == "forget"), sums


@ray.remote(num_cpus=TASK_CPUS)
def _evaluation_cache(world_name: str, hook_name: str) -> tuple[bool, Any]:
    """True, and what scoring needs and does not depend on the SAE; see `raysae.unlearning`."""
    from raysae.unlearning import build_cache, default_eval_config
    from raysae.worlds import load_world

    model, _ = _model_and_tokens(world_name)
    world = load_world(world_name)
    return True, build_cache(world, model, hook_name, default_eval_config(world))
