"""Which rows make up a batch: a pure function of (seed, step), the same on every machine."""

from __future__ import annotations

from threading import Lock

import numpy as np

from raysae.training.mixture import forget_rows

_FORGET, _RETAIN, _ORDER = 1, 2, 3
"""Streams of a trial's seed beside the one of whole-store batches. SeedSequence pads with zeros, so
a stream 0 would be that one."""


def batch_rows(
    n_rows: int, seed: int, step: int, batch_size: int, rank: int = 0, size: int = 1
) -> np.ndarray:
    """Row numbers of this worker's share of the batch of one step.

    Batches are cut from seeded permutations of all rows, an epoch each, one behind the other: every
    row comes exactly once an epoch. Where an epoch is no whole number of batches, the batch at its
    end takes what it lacks from the following epoch, rows that it does not hold yet; see
    `epoch_order`. Rank r takes positions r, r + size, … of the batch, so the workers of a trial
    together see what one worker would.

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
    """Like `batch_rows`, with `forget_rows(forget_share, batch_size)` rows of the forget corpus.

    Each corpus has epochs of its own, of which every batch takes its part as above. The two parts
    are mixed by a permutation of the step, so that every rank gets some of both.

    Args:
        forget, retain: row numbers of the two corpora.
        forget_share: between 0 and 1.

    Raises:
        ValueError: a corpus has no row in a batch, or fewer rows than its part of one.
    """
    n_forget = forget_rows(forget_share, batch_size)
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
        parts.append(corpus[_cut(len(corpus), step, wanted, seed, stream)])
    order = np.random.default_rng([seed, step, _ORDER]).permutation(batch_size)
    rows: np.ndarray = np.concatenate(parts)[order[rank::size]]
    return rows


def place_of(n_rows: int, step: int, batch_size: int) -> tuple[int, slice]:
    """The epoch to which the last row of a step's batch belongs, and where in that epoch's order
    the batch is."""
    epoch = ((step + 1) * batch_size - 1) // n_rows
    start = (step - epoch * n_rows // batch_size) * batch_size
    return epoch, slice(start, start + batch_size)


def epoch_order(n_rows: int, seed: int, epoch: int, batch_size: int) -> np.ndarray:
    """The rows that the epoch before has left over, fewer than a batch, and then all rows once:
    what `batch_rows` cuts the batches from that end in this epoch.

    No row is twice in a batch, but in a store of fewer than two batches, which may leave no other.

    Returns:
        int32 where that is enough, else int64, (n_rows + fewer than batch_size,); read-only.
    """
    return _ORDERS.get(n_rows, epoch, batch_size, seed)


def _cut(n_rows: int, step: int, batch_size: int, seed: int, *stream: int) -> np.ndarray:
    epoch, place = place_of(n_rows, step, batch_size)
    order = _ORDERS.get(n_rows, epoch, batch_size, seed, *stream)
    rows: np.ndarray = order[place].astype(np.int64)
    return rows


class _Orders:
    """The orders in use: of every (rows, batch size, seed, stream) that of one epoch.

    SAEs that are trained together each have their own, and take turns: an order that is dropped
    between two turns is made anew at every step, at the cost of the step itself. So none is dropped
    for being one too many, but for not having been asked for lately.
    """

    LATELY = 256
    """Calls; more than the SAEs and corpora of any pack, which are asked for in turn."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, ...], tuple[int, np.ndarray]] = {}
        self._asked: dict[tuple[int, ...], int] = {}
        self._calls = 0
        self._lock = Lock()  # batches may be made in a thread ahead of the training

    def get(self, n_rows: int, epoch: int, batch_size: int, seed: int, *stream: int) -> np.ndarray:
        """As `epoch_order`, of one stream."""
        key = (n_rows, batch_size, seed, *stream)
        with self._lock:
            self._calls += 1
            self._asked[key] = self._calls
            made_for, order = self._made.get(key, (None, None))
            if order is None or made_for != epoch:
                before = order if made_for == epoch - 1 else None
                order = _order(n_rows, epoch, batch_size, (seed, *stream), before)
                self._made[key] = epoch, order
                for other in [k for k, at in self._asked.items() if at < self._calls - self.LATELY]:
                    del self._made[other], self._asked[other]
            return order

    def __len__(self) -> int:
        return len(self._made)


_ORDERS = _Orders()


def _order(
    n_rows: int, epoch: int, batch_size: int, seed: tuple[int, ...], before: np.ndarray | None
) -> np.ndarray:
    """The order of an epoch; `before` is that of the epoch before, where it is at hand."""
    first, *stream = seed
    order = _permutation(n_rows, first, epoch, *stream)
    carried, left = epoch * n_rows % batch_size, (epoch + 1) * n_rows % batch_size
    if carried:
        # The end of a permutation is never touched, so that of the epoch before needs no other.
        last = _permutation(n_rows, first, epoch - 1, *stream) if before is None else before
        last = last[-carried:]
        _part(order[: n_rows - left], batch_size - carried, last)
        order = np.concatenate([last, order])
    order.setflags(write=False)
    return order


def _part(order: np.ndarray, first: int, others: np.ndarray) -> None:
    """Change rows among the first ones that are also `others` with the next ones that are not, in
    place, as far as there are."""
    twice = np.flatnonzero(np.isin(order[:first], others))
    next_ones = order[first : first + len(twice) + len(others)]
    free = first + np.flatnonzero(~np.isin(next_ones, others))
    n = min(len(twice), len(free))
    twice, free = twice[:n], free[:n]
    order[twice], order[free] = order[free], order[twice]


def _permutation(n_rows: int, *seed: int) -> np.ndarray:
    order: np.ndarray = np.random.default_rng(seed).permutation(n_rows)
    return order.astype(np.int32) if n_rows < 2**31 else order  # half the memory in every worker
