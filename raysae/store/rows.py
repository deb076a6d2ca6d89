"""Which rows make up a batch: a pure function of (seed, step), the same on every machine."""

from __future__ import annotations

from threading import Lock

import numpy as np

_FORGET, _RETAIN, _ORDER = 1, 2, 3
"""Streams of a trial's seed beside the one of whole-store batches. SeedSequence pads with zeros, so
a stream 0 would be that one."""


def batch_rows(
    n_rows: int, seed: int, step: int, batch_size: int, rank: int = 0, size: int = 1
) -> np.ndarray:
    """Row numbers of this worker's share of the batch of one step.

    An epoch is a seeded permutation of all rows, cut into whole batches (the remainder, less than a
    batch, is left out of that epoch); every epoch has its own permutation. Rank r takes positions
    r, r + size, … of the batch, so the workers of a trial together see what one worker would.

    Args:
        n_rows: rows in the store; at least `batch_size`.
        seed, step: of the trial, and its training step from 0.
        batch_size: rows of the whole batch.
        rank, size: the worker's place in its trial.

    Returns:
        int64 (⌈(batch_size − rank) / size⌉,)

    Raises:
        ValueError: a batch is larger than the store.
    """
    if batch_size > n_rows:
        raise ValueError(f"batch_size {batch_size} is larger than the store ({n_rows} rows)")
    return _cut(n_rows, step, batch_size, seed)[rank::size]


def mixed_batch_rows(
    forget: np.ndarray,
    retain: np.ndarray,
    forget_share: float,
    seed: int,
    step: int,
    batch_size: int,
    rank: int = 0,
    size: int = 1,
) -> np.ndarray:
    """Like `batch_rows`, with round(forget_share · batch_size) rows of the forget corpus.

    Each corpus has epochs of its own, a permutation of its rows cut into its part of whole batches:
    no row comes again before the others of its corpus have come (but a remainder, as above). The
    two parts are mixed by a permutation of the step, so that every rank gets some of both.

    Args:
        forget, retain: row numbers of the two corpora.
        forget_share: between 0 and 1.

    Raises:
        ValueError: a corpus has fewer rows than its part of a batch.
    """
    n_forget = round(forget_share * batch_size)
    parts = []
    for name, corpus, wanted, stream in (
        ("forget", forget, n_forget, _FORGET),
        ("retain", retain, batch_size - n_forget, _RETAIN),
    ):
        if wanted > len(corpus):
            raise ValueError(
                f"forget_share {forget_share:g} of batch_size {batch_size} asks for {wanted} "
                f"{name} rows a batch; the store has {len(corpus)}"
            )
        if wanted:
            parts.append(corpus[_cut(len(corpus), step, wanted, seed, stream)])
    order = np.random.default_rng([seed, step, _ORDER]).permutation(batch_size)
    rows: np.ndarray = np.concatenate(parts)[order[rank::size]]
    return rows


def place_of(n_rows: int, step: int, batch_size: int) -> tuple[int, slice]:
    """The epoch of a step, and where in the epoch's order its batch is."""
    epoch, position = divmod(step, n_rows // batch_size)
    return epoch, slice(position * batch_size, (position + 1) * batch_size)


def epoch_order(n_rows: int, seed: int, epoch: int) -> np.ndarray:
    """All rows (n_rows,) in the order in which `batch_rows` cuts them into the epoch's batches;
    int32 where that is enough, read-only."""
    return _PERMUTATIONS.get(n_rows, seed, epoch)


def _cut(n_rows: int, step: int, batch_size: int, seed: int, *stream: int) -> np.ndarray:
    epoch, place = place_of(n_rows, step, batch_size)
    rows: np.ndarray = _PERMUTATIONS.get(n_rows, seed, epoch, *stream)[place].astype(np.int64)
    return rows


class _Permutations:
    """The permutations in use: of every (rows, seed, stream) that of one epoch.

    SAEs that are trained together each have their own, and take turns: a permutation that is
    dropped between two turns is made anew at every step, at the cost of the step itself. So none
    is dropped for being one too many, but for not having been asked for lately.
    """

    LATELY = 256
    """Calls; more than the SAEs and corpora of any pack, which are asked for in turn."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, ...], tuple[int, np.ndarray]] = {}
        self._asked: dict[tuple[int, ...], int] = {}
        self._calls = 0
        self._lock = Lock()  # batches may be made in a thread ahead of the training

    def get(self, n_rows: int, seed: int, epoch: int, *stream: int) -> np.ndarray:
        """int32 where that is enough, else int64, (n_rows,); read-only."""
        key = (n_rows, seed, *stream)
        with self._lock:
            self._calls += 1
            self._asked[key] = self._calls
            made_for, order = self._made.get(key, (None, None))
            if order is None or made_for != epoch:
                order = _permutation(n_rows, seed, epoch, *stream)
                self._made[key] = epoch, order
                for other in [k for k, at in self._asked.items() if at < self._calls - self.LATELY]:
                    del self._made[other], self._asked[other]
            return order

    def __len__(self) -> int:
        return len(self._made)


_PERMUTATIONS = _Permutations()


def _permutation(n_rows: int, *seed: int) -> np.ndarray:
    order: np.ndarray = np.random.default_rng(seed).permutation(n_rows)
    if n_rows < 2**31:  # half the memory in every worker
        order = order.astype(np.int32)
    order.setflags(write=False)
    return order
