"""What a search hands to its workers: references to chunks, and how to open them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import ray
from ray import ObjectRef

from raysae.store.checked import check_once, map_checked
from raysae.store.chunks import CORPORA, Moments
from raysae.store.files import checksums
from raysae.store.mapped import MappedEvaluation
from raysae.store.tiers import fits_on_device, human

if TYPE_CHECKING:
    import torch

    from raysae.store.batches import ChunkedActivations
    from raysae.unlearning import EvaluationCache

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldChunk:
    """A chunk that every process of its node can read without a copy, and its checksum."""

    place: ObjectRef | Path
    """Of the activations: in the object store, or a file of the cache that is mapped."""
    origin: ObjectRef
    """int32 (2, rows): token ids, and positions in the corpus."""
    sha256: str
    """Of the activations' bytes."""


class CorruptCopyError(Exception):
    """A copy of chunks, on a device or a node, does not hold what was harvested."""


@dataclass(frozen=True)
class Sharing:
    """Processes that have one copy on a device together."""

    group: str
    """The same for all of them, and for nobody else on the machine."""
    workers: int
    """How many there are on a device, at most."""


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

    @property
    def digest(self) -> str:
        """The sha256 (hex) over the checksums of all chunks, in the order of the rows."""
        return hashlib.sha256("".join(chunk.sha256 for chunk in self.chunks).encode()).hexdigest()

    def arrays(self) -> list[np.ndarray]:
        """The chunks' activations, read-only, in shared memory or mapped.

        Raises:
            CorruptFileError: a file is not what was written.
        """
        refs = [c.place for c in self.chunks if not isinstance(c.place, Path)]
        got = iter(ray.get(refs))
        return [
            map_checked(c.place, {"activations": c.sha256})["activations"]
            if isinstance(c.place, Path)
            else next(got)
            for c in self.chunks
        ]

    def _check(self, arrays: list[np.ndarray]) -> None:
        """Compare this node's copy of every chunk with its checksum; `arrays` has looked at files.

        Chunks of a lost node are computed again by Ray, wherever there is room: on another kind of
        device with other last digits. The pool's workers are all started anew then, so on every
        node one worker of each start looks for all.

        Raises:
            CorruptCopyError: a chunk is another one.
        """
        context = ray.get_runtime_context()
        start, node = context.get_placement_group_id(), context.get_node_id()

        def compare() -> None:
            wrong = different(self.chunks, arrays)
            if wrong:
                raise CorruptCopyError(
                    f"{wrong[0]}: {len(wrong)} of {len(self.chunks)} chunks on node {node} are not "
                    "what was harvested. Ray computes chunks of a lost node again, which gives "
                    "other last digits on another kind of device"
                )

        if start is None:
            compare()
        else:
            check_once(f"{start} {node} {self.digest}", compare)

    def open(self, device: str = "cpu", sharing: Sharing | None = None) -> ChunkedActivations:
        """Batches over the chunks, in the calling process.

        On a GPU whose free memory has room for all of them they are copied there once; otherwise
        every batch is gathered from host memory, on a GPU one step ahead. `where` of what is
        returned says which, with the sizes that decided it.

        Args:
            device: where batches are wanted.
            sharing: with which other processes on that device, for whom one copy will do; batches
                then raise `LostCopyError` once the process that holds it has ended.

        Raises:
            CorruptCopyError: what lies on the device is not what the chunks hold, or this node's
                chunks are not what was harvested.
            CorruptFileError: a file is not what was written.
        """
        from raysae.store.batches import ChunkedActivations

        arrays, gpu, cannot = self.arrays(), device.startswith("cuda"), ""
        self._check(arrays)
        if sharing is not None:
            shared, cannot = self._open_shared(device, arrays, sharing)
            if shared is not None:
                return shared
        free = _free_bytes(device) if gpu else 0
        # Where one copy cannot be shared there is no room for several either, that anyone knows of.
        resident = gpu and sharing is None and fits_on_device(self.nbytes, free)
        mapped = any(isinstance(chunk.place, Path) for chunk in self.chunks)
        where = "files mapped from disk" if mapped else "shared memory"
        if gpu:
            where = f"a copy on {device}" if resident else f"{where}, one step ahead"
            where += f" ({human(self.nbytes)}, {human(free)} were free on the device{cannot})"
        return ChunkedActivations.with_moments(
            arrays,
            self.is_forget,
            self.moments,
            device=device,
            resident=resident,
            prefetch=gpu and not resident,
            where=where,
        )

    def _open_shared(
        self, device: str, arrays: list[np.ndarray], sharing: Sharing
    ) -> tuple[ChunkedActivations | None, str]:
        """Batches from the one copy on the device; None where there is none, and why, in words."""
        import torch

        from raysae.store.batches import ChunkedActivations, ResidentRows, copy_to
        from raysae.store.one_copy import CannotShareError, share

        lengths = [len(array) for array in arrays]

        def place() -> tuple[torch.Tensor, str] | None:
            free = _free_bytes(device)
            if not fits_on_device(self.nbytes, free):
                return None
            rows = copy_to(torch.device(device), arrays)
            wanted = [chunk.sha256 for chunk in self.chunks]
            if all(wanted) and ResidentRows(rows, lengths).checksums() != wanted:
                raise CorruptCopyError(f"the copy on {device} has other checksums than the store")
            return rows, (
                f"one copy on {device} for up to {sharing.workers} workers ({human(self.nbytes)}, "
                f"{human(free)} were free on the device)"
            )

        # Not by Ray's references alone: what lies there is told apart by what it is.
        content = "".join(chunk.sha256 or str(chunk.place) for chunk in self.chunks)
        try:
            copy = share(f"{sharing.group}:{content}", torch.device(device), place)
        except CannotShareError as error:
            log.warning("the copy on %s cannot be shared: %s", device, error)
            return None, f"; no copy is shared there: {error}"
        if copy is None:
            return None, ""
        rows = ResidentRows(copy.rows, lengths, copy.check)
        for array, ends in zip(arrays, rows.ends(), strict=True):
            if array[[0, -1]].tobytes() != ends.tobytes():
                raise CorruptCopyError(
                    f"the copy on {device} that process {copy.holder} holds is not of this store"
                )
        opened = ChunkedActivations.with_moments(
            arrays, self.is_forget, self.moments, device=device, copy=rows, where=copy.where
        )
        return opened, ""

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


def different(chunks: Sequence[HeldChunk], arrays: Iterable[np.ndarray]) -> list[str]:
    """Of the chunks that are not what was harvested: in words, what they should be and are."""
    shared = [
        (i, chunk.sha256, array)
        for i, (chunk, array) in enumerate(zip(chunks, arrays, strict=True))
        if chunk.sha256 and not isinstance(chunk.place, Path)
    ]
    found = checksums(array for _, _, array in shared)
    return [
        f"chunk {i} has the sha256 {now[:12]} in place of {wanted[:12]}"
        for (i, wanted, _), now in zip(shared, found, strict=True)
        if now != wanted
    ]


def _free_bytes(device: str) -> int:
    """Bytes of a GPU's memory, or of the machine's, that nobody holds."""
    if not device.startswith("cuda"):
        return int(psutil.virtual_memory().available)
    import torch

    return int(torch.cuda.mem_get_info(device)[0])
