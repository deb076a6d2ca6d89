"""Batches from read-only chunks: gathered from shared memory, or from a copy on the device."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import ref

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from torch import Tensor

from raysae.store.chunks import Moments
from raysae.store.files import checksum, checksums, cores
from raysae.store.rows import batch_rows, epoch_order, mixed_batch_rows, place_of

CACHED_BYTES = 8 << 20
"""A batch that stays in a cache: its rows are gathered and scaled all at once."""
BLOCK_BYTES = 1 << 20
"""Of a larger one they are gathered, scaled and put into the batch in blocks that do."""

MOST_ORDERS = 64
"""Epochs' orders on a device at most: more than SAEs are trained at the same time."""

MOST_AHEAD = 32
"""Batches prefetched at most: one for each SAE that is trained at the same time."""

_Request = tuple[int, int, int, int, int]


class Rows(Protocol):
    """All rows of the store, wherever they lie."""

    n_rows: int
    d_in: int

    def take(self, rows: np.ndarray, scale: float) -> Tensor:
        """Those rows · scale, float32 (len(rows), d_in), on the device."""
        ...

    def checksums(self) -> list[str]:
        """The sha256 (hex) of every chunk's bytes, as they lie there now."""
        ...


class _SharedRows:
    """Rows in chunks of host memory: Ray's shared memory, or files that are mapped.

    They are gathered by address, from one view over all chunks in which a row begins at every
    element: one call finds rows of any chunk, in the order that is wanted. What lies between two
    chunks is never read.
    """

    def __init__(self, chunks: list[np.ndarray], device: torch.device) -> None:
        # What is found by address lies whole and aligned: stored chunks do, and are not copied.
        self._chunks = chunks = [np.require(chunk, requirements=["C", "A"]) for chunk in chunks]
        self._device = device
        self.n_rows, self.d_in = sum(map(len, chunks)), int(chunks[0].shape[1])
        first = min(chunks, key=_address)
        size = first.itemsize
        starts = [(_address(chunk) - _address(first)) // size for chunk in chunks]
        spans = [(start, start + chunk.size) for start, chunk in zip(starts, chunks, strict=True)]
        end = max(stop for _, stop in spans)
        shape, strides = (end - self.d_in + 1, self.d_in), (size, size)
        self._view = _read_only(as_strided(first, shape, strides))
        dtype = torch.int32 if end < 2**31 else torch.int64  # half the memory in every worker
        places = [torch.arange(*span, self.d_in, dtype=dtype) for span in spans]
        self._places = torch.cat(places)

    def take(self, rows: np.ndarray, scale: float) -> Tensor:
        places = self._places.index_select(0, torch.from_numpy(rows))
        n, on_gpu = len(rows), self._device.type == "cuda"
        if 4 * n * self.d_in <= CACHED_BYTES and not on_gpu:
            return self._view.index_select(0, places).float().mul_(scale)
        out = torch.empty(n, self.d_in, pin_memory=on_gpu)
        at_once = max(1, BLOCK_BYTES // (4 * self.d_in))
        for wanted, block in zip(places.split(at_once), out.split(at_once), strict=True):
            torch.mul(self._view.index_select(0, wanted).float(), scale, out=block)
        return _send(out, self._device)

    def checksums(self) -> list[str]:
        return checksums(self._chunks)


class ResidentRows:
    """A copy of all rows on the device: this process's own, or one that several read."""

    def __init__(
        self, rows: Tensor, lengths: Sequence[int], check: Callable[[], None] | None = None
    ) -> None:
        """
        Args:
            rows: float32 or bfloat16 (n_rows, d_in) on the device, only read from.
            lengths: rows of each chunk.
            check: raises where the memory may not be read; called before every batch.
        """
        if sum(lengths) != len(rows):
            raise ValueError(f"a copy of {len(rows)} rows for chunks of {sum(lengths)}")
        self.n_rows, self.d_in = int(rows.shape[0]), int(rows.shape[1])
        self._rows, self._lengths, self._check = rows, list(lengths), check

    def take(self, rows: np.ndarray, scale: float) -> Tensor:
        self.check()
        return self.select(_send(torch.from_numpy(rows), self._rows.device), scale)

    def check(self) -> None:
        """Raise where the memory may not be read."""
        if self._check is not None:
            self._check()

    def select(self, rows: Tensor, scale: float) -> Tensor:
        """`take`, of row numbers that are on the device already."""
        return self._rows.index_select(0, rows).float().mul_(scale)

    def checksums(self) -> list[str]:
        parts = self._rows.split(self._lengths)
        with ThreadPoolExecutor(cores(), "checksum") as threads:  # each brings its own part here
            return list(threads.map(lambda part: checksum(_as_stored(part)), parts))

    def ends(self) -> list[np.ndarray]:
        """The first and the last row of every chunk, as chunks hold them: (2, d_in) each."""
        parts = self._rows.split(self._lengths)
        return [_as_stored(torch.stack([part[0], part[-1]])) for part in parts]


def copy_to(device: torch.device, chunks: Sequence[np.ndarray]) -> Tensor:
    """All rows of the chunks in one tensor on the device, (n_rows, d_in) float32 or bfloat16."""
    dtype = torch.bfloat16 if chunks[0].dtype == np.int16 else torch.float32
    n_rows, d_in = sum(map(len, chunks)), int(chunks[0].shape[1])
    rows = torch.empty(n_rows, d_in, dtype=dtype, device=device)
    start = 0
    for chunk in chunks:
        part = torch.tensor(chunk)
        rows[start : start + len(chunk)] = (
            part.view(torch.bfloat16) if part.dtype == torch.int16 else part
        )
        start += len(chunk)
    return rows


def _as_stored(rows: Tensor) -> np.ndarray:
    """As a chunk holds them, in host memory: float32, or int16 for bfloat16."""
    array: np.ndarray = (rows.view(torch.int16) if rows.dtype == torch.bfloat16 else rows).numpy(
        force=True
    )
    return array


class ChunkedActivations:
    """Batches from read-only chunks; implements `raysae.training.loop.ActivationSource`.

    Chunks stay where they are, and only the rows of a batch are copied; or all of them are copied
    to the device once. The batches are the same, bit for bit.
    """

    def __init__(
        self,
        chunks: list[np.ndarray],
        is_forget: np.ndarray,
        *,
        scale: float,
        mean: np.ndarray,
        variance: float,
        moments: Mapping[str, Moments] | None = None,
        device: str = "cpu",
        resident: bool = False,
        prefetch: bool = False,
        copy: Rows | None = None,
        where: str = "host memory",
    ) -> None:
        """
        Args:
            chunks: activations (rows, d_in) float32, or int16 that holds bfloat16.
            is_forget: label of every row over all chunks, bool (n_rows,).
            scale: factor on the raw activations.
            mean: of the raw activations (d_in,).
            variance: E‖x − mean‖² of the raw activations.
            moments: of each corpus, as `add_up` gives them; needed for `with_forget_share` only.
            resident: copy all rows to the device now.
            prefetch: gather the batch of the following step in a thread while this one is used; it
                is copied to a GPU on a stream of its own.
            copy: of all rows on the device, where there is one already: what batches come from.
            where: where batches are gathered from, in words.
        """
        self._device = torch.device(device)
        if copy is not None:
            rows = copy
        elif resident:
            rows = ResidentRows(copy_to(self._device, chunks), [len(chunk) for chunk in chunks])
        else:
            rows = _SharedRows(chunks, self._device)
        if len(is_forget) != rows.n_rows:
            raise ValueError(f"{len(is_forget)} labels for {rows.n_rows} rows")
        self._chunks, self._rows, self.where = chunks, rows, where
        self._is_forget, self._moments = is_forget, moments
        self.n_rows, self.d_in = rows.n_rows, rows.d_in
        self._set_units(scale, mean, variance)
        self._mixed: tuple[np.ndarray, np.ndarray, float] | None = None
        self._corpora: tuple[np.ndarray, np.ndarray] | None = None
        # Those that somebody trains on: a searched share is another one in every trial.
        self._mixtures: dict[float, ref[ChunkedActivations]] = {}
        self._orders = None
        if isinstance(rows, ResidentRows):
            self._orders = _Orders(rows.n_rows, is_forget, self._device)
        self._thread = ThreadPoolExecutor(1, "prefetch") if prefetch else None
        on_gpu = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if prefetch and on_gpu else None
        self._ahead: dict[_Request, Future[_Ahead]] = {}

    @classmethod
    def with_moments(
        cls,
        chunks: list[np.ndarray],
        is_forget: np.ndarray,
        moments: Mapping[str, Moments],
        *,
        device: str = "cpu",
        resident: bool = False,
        prefetch: bool = False,
        copy: Rows | None = None,
        where: str = "host memory",
    ) -> ChunkedActivations:
        """Scale, mean and variance from the moments of all rows."""
        total = moments["all"]
        return cls(
            chunks,
            is_forget,
            scale=total.scale,
            mean=total.mean,
            variance=total.variance,
            moments=moments,
            device=device,
            resident=resident,
            prefetch=prefetch,
            copy=copy,
            where=where,
        )

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_mixtures": {}}  # weak references do not travel

    def checksums(self) -> list[str]:
        """The sha256 (hex) of every chunk's bytes, as they lie now where batches come from."""
        return self._rows.checksums()

    def with_forget_share(self, forget_share: float) -> ChunkedActivations:
        """The same rows, with this share of forget rows in every batch, see `mixed_batch_rows`.

        Scale, mean and variance become those of the mixture.
        """
        if self._moments is None:
            raise ValueError("a forget_share needs the moments of both corpora")
        made = self._mixtures.get(forget_share)
        mixture_at_hand = None if made is None else made()
        if mixture_at_hand is not None:
            return mixture_at_hand
        for ended in [share for share, made in self._mixtures.items() if made() is None]:
            del self._mixtures[ended]
        if self._corpora is None:
            forget, retain = np.flatnonzero(self._is_forget), np.flatnonzero(~self._is_forget)
            self._corpora = forget.astype(np.int32), retain.astype(np.int32)
        other: ChunkedActivations = object.__new__(type(self))
        vars(other).update(vars(self))
        other._mixed, other._ahead = (*self._corpora, forget_share), {}
        mixture = self._moments["forget"].weighted(forget_share) + self._moments["retain"].weighted(
            1 - forget_share
        )
        other._set_units(mixture.scale, mixture.mean, mixture.variance)
        self._mixtures[forget_share] = ref(other)
        return other

    def _set_units(self, scale: float, mean: np.ndarray, variance: float) -> None:
        self.scale = scale
        self.mean = torch.tensor(mean, dtype=torch.float32, device=self._device) * scale
        self.variance = variance * scale**2

    def batch(
        self, seed: int, step: int, batch_size: int, rank: int = 0, size: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Scaled float32 activations (rows, d_in) and is_forget (rows,) on the device."""
        if self._thread is None:
            return self._make(seed, step, batch_size, rank, size)
        request = (seed, step, batch_size, rank, size)
        ahead = self._ahead.pop(request, None)
        made = self._make(*request) if ahead is None else ahead.result().take()
        following = (seed, step + 1, batch_size, rank, size)
        while len(self._ahead) >= MOST_AHEAD:  # of SAEs that have ended
            self._ahead.pop(next(iter(self._ahead))).cancel()
        self._ahead[following] = self._thread.submit(self._make_ahead, *following)
        return made

    def batches(
        self, seeds: Sequence[int], step: int, batch_size: int, rank: int = 0, size: int = 1
    ) -> tuple[Tensor, Tensor]:
        """`batch` of each seed, one after the other: (seeds, rows, d_in) and (seeds, rows)."""
        if self._thread is not None:
            made = [self.batch(seed, step, batch_size, rank, size) for seed in seeds]
            of_seeds, labels_of_seeds = zip(*made, strict=True)
            return torch.stack(of_seeds), torch.stack(labels_of_seeds)
        if self._orders is not None and self._mixed is None:
            acts, labels = self._select(seeds, step, batch_size, rank, size)
        else:
            rows = [self._rows_of(seed, step, batch_size, rank, size) for seed in seeds]
            acts, labels = self._take(np.concatenate(rows))
        shape = (len(seeds), -1)
        return acts.view(*shape, self.d_in), labels.view(shape)

    def done_with(self, seeds: Collection[int]) -> None:
        """Let go of what lies ready for the next batches of these seeds: nobody trains on them."""
        for request in [request for request in self._ahead if request[0] in seeds]:
            self._ahead.pop(request).cancel()
        if self._orders is not None:
            self._orders.let_go(seeds)

    def _make(
        self, seed: int, step: int, batch_size: int, rank: int, size: int
    ) -> tuple[Tensor, Tensor]:
        if self._orders is not None and self._mixed is None:
            return self._select([seed], step, batch_size, rank, size)
        return self._take(self._rows_of(seed, step, batch_size, rank, size))

    def _select(
        self, seeds: Sequence[int], step: int, batch_size: int, rank: int, size: int
    ) -> tuple[Tensor, Tensor]:
        """The batches, one behind the other, by orders that lie on the device as the rows do: the
        host sends nothing, which takes a GPU longer than to gather a batch."""
        assert self._orders is not None and isinstance(self._rows, ResidentRows)
        self._rows.check()
        rows = torch.cat([self._orders.rows(seed, step, batch_size)[rank::size] for seed in seeds])
        return self._rows.select(rows, self.scale), self._orders.is_forget.index_select(0, rows)

    def _rows_of(self, seed: int, step: int, batch_size: int, rank: int, size: int) -> np.ndarray:
        if self._mixed is None:
            return batch_rows(self.n_rows, seed, step, batch_size, rank, size)
        return mixed_batch_rows(*self._mixed, seed, step, batch_size, rank, size)

    def _take(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        labels = torch.from_numpy(self._is_forget.take(rows))
        return self._rows.take(rows, self.scale), _send(labels, self._device)

    def _make_ahead(self, *request: int) -> _Ahead:
        if self._stream is None:
            return _Ahead(self._make(*request), None)
        with torch.cuda.stream(self._stream):
            return _Ahead(self._make(*request), self._stream.record_event())


class _Orders:
    """Labels and the order of the current epoch on the device: of every seed that asks, as long as
    it does not stop asking."""

    def __init__(self, n_rows: int, is_forget: np.ndarray, device: torch.device) -> None:
        self._n_rows, self._device = n_rows, device
        self.is_forget = torch.tensor(is_forget, device=device)
        self._made: OrderedDict[tuple[int, int], tuple[int, Tensor]] = OrderedDict()

    def rows(self, seed: int, step: int, batch_size: int) -> Tensor:
        """As `batch_rows` of one worker."""
        if batch_size > self._n_rows:
            batch_rows(self._n_rows, seed, step, batch_size)  # says what is wrong
        epoch, place = place_of(self._n_rows, step, batch_size)
        key = seed, batch_size
        made = self._made.get(key)
        if made is None or made[0] != epoch:
            order = torch.from_numpy(epoch_order(self._n_rows, seed, epoch, batch_size).copy())
            made = self._made[key] = epoch, _send(order, self._device)
            while len(self._made) > MOST_ORDERS:
                self._made.popitem(last=False)
        self._made.move_to_end(key)
        return made[1][place]

    def let_go(self, seeds: Collection[int]) -> None:
        """Forget the orders of these seeds."""
        for key in [key for key in self._made if key[0] in seeds]:
            del self._made[key]


@dataclass(frozen=True)
class _Ahead:
    """A batch that was made while another one was used."""

    batch: tuple[Tensor, Tensor]
    copied: torch.cuda.Event | None
    """Where its copies to a GPU run on a stream of their own: comes behind them."""

    def take(self) -> tuple[Tensor, Tensor]:
        """The batch, for the stream that the caller works on: the stream waits, not the caller."""
        if self.copied is not None:
            stream = torch.cuda.current_stream(self.batch[0].device)
            stream.wait_event(self.copied)
            for tensor in self.batch:
                # Its memory belongs to the other stream, which must not reuse it too soon.
                tensor.record_stream(stream)
        return self.batch


def _send(values: Tensor, device: torch.device) -> Tensor:
    """The values on the device; on a GPU without waiting for it, which takes pinned memory.

    That memory may be let go of at once: torch gives it to nobody before it has been read.
    """
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def _address(chunk: np.ndarray) -> int:
    return int(chunk.ctypes.data)


def _read_only(chunk: np.ndarray) -> Tensor:
    """The chunk's memory as float32 or bfloat16, for reading: torch knows no memory that must not
    be written to, and says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        tensor = torch.from_numpy(chunk)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor
