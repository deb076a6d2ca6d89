"""What a search hands to its workers: references to chunks, and how to open them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray import ObjectRef

from raysae.store.chunks import CORPORA, Moments
from raysae.store.files import map_tensors
from raysae.store.mapped import MappedEvaluation
from raysae.store.tiers import fits_on_device, human

if TYPE_CHECKING:
    from raysae.store.batches import ChunkedActivations
    from raysae.unlearning import EvaluationCache


@dataclass(frozen=True)
class HeldChunk:
    """A chunk that every process of its node can read without a copy, and its checksum."""

    place: ObjectRef | Path
    """Of the activations: in the object store, or a file of the cache that is mapped."""
    origin: ObjectRef
    """int32 (2, rows): token ids, and positions in the corpus."""
    sha256: str
    """Of the activations' bytes."""


@dataclass(frozen=True)
class StoreHandle:
    """References to everything that is computed once per search and read by every worker."""

    chunks: tuple[HeldChunk, ...]
    is_forget: np.ndarray  # bool (rows,), over all chunks
    moments: dict[str, Moments]
    evaluation_cache: ObjectRef | None
    """Of (arrays, facts), as `EvaluationCache.to_plain`, or of a `MappedEvaluation`."""
    nbytes: int
    known_questions: Mapping[str, tuple[int, ...]] | None = None
    """As the search found them, where the world does not say."""

    @property
    def rows(self) -> int:
        """Rows of all chunks."""
        return len(self.is_forget)

    def with_evaluation_cache(self, ref: ObjectRef) -> StoreHandle:
        """The same store, with a reference to what scoring needs."""
        return replace(self, evaluation_cache=ref)

    def arrays(self) -> list[np.ndarray]:
        """The chunks' activations, read-only, in shared memory or mapped."""
        refs = [c.place for c in self.chunks if not isinstance(c.place, Path)]
        got = iter(ray.get(refs))
        return [
            map_tensors(c.place)["activations"] if isinstance(c.place, Path) else next(got)
            for c in self.chunks
        ]

    def open(self, device: str = "cpu") -> ChunkedActivations:
        """Batches over the chunks, in the calling process.

        On a GPU whose free memory has room for all of them they are copied there once; otherwise
        every batch is gathered from host memory, on a GPU one step ahead. `where` of what is
        returned says which, with the sizes that decided it.
        """
        from raysae.store.batches import ChunkedActivations

        gpu = device.startswith("cuda")
        free = _free_bytes(device) if gpu else 0
        resident = gpu and fits_on_device(self.nbytes, free)
        mapped = any(isinstance(chunk.place, Path) for chunk in self.chunks)
        where = "files mapped from disk" if mapped else "shared memory"
        if gpu:
            where = f"a copy on {device}" if resident else f"{where}, one step ahead"
            where += f" ({human(self.nbytes)}, {human(free)} were free on the device)"
        return ChunkedActivations.with_moments(
            self.arrays(),
            self.is_forget,
            self.moments,
            device=device,
            resident=resident,
            prefetch=gpu and not resident,
            where=where,
        )

    def bytes_by_tier(self) -> dict[str, int]:
        """Bytes of the chunks in the object store and of those mapped from the cache on disk."""
        tiers = {"object_store": 0, "disk": 0}
        for chunk, array in zip(self.chunks, self.arrays(), strict=True):
            tiers["disk" if isinstance(chunk.place, Path) else "object_store"] += array.nbytes
        return tiers

    def open_evaluation_cache(self) -> EvaluationCache:
        """What the cached evaluator needs; waits until it is there."""
        from raysae.unlearning import EvaluationCache

        assert self.evaluation_cache is not None, "harvested without it"
        found = ray.get(self.evaluation_cache)
        if isinstance(found, MappedEvaluation):
            return EvaluationCache.from_plain(found.file.open(), found.facts)
        arrays, facts = found
        return EvaluationCache.from_plain(arrays, facts)

    def origin(self, rows: np.ndarray) -> dict[str, Any]:
        """Where rows came from: `corpus` names, `tokens` ids and `positions` in the corpus.

        Args:
            rows: row numbers over all chunks, (n,).
        """
        origins = np.concatenate(ray.get([chunk.origin for chunk in self.chunks]), axis=1)
        tokens, positions = origins[:, rows]
        corpus = np.where(self.is_forget[rows], *CORPORA)
        return {"corpus": corpus, "tokens": tokens, "positions": positions}


def _free_bytes(device: str) -> int:
    import torch

    return int(torch.cuda.mem_get_info(device)[0])
