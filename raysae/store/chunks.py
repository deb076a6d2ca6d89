"""What a harvest yields: chunks of activations, where each row came from, and their moments."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Literal

import numpy as np

StoreDtype = Literal["float32", "bfloat16"]
CORPORA = ("forget", "retain")


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over rows in raw units, in float64."""

    rows: float
    x: np.ndarray
    """Σx, (d_in,)."""
    norm: float
    """Σ‖x‖."""
    norm2: float
    """Σ‖x‖²."""

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.rows + other.rows,
            self.x + other.x,
            self.norm + other.norm,
            self.norm2 + other.norm2,
        )

    def weighted(self, weight: float) -> Moments:
        """As if the rows were `weight` rows with the same means."""
        factor = weight / self.rows
        return Moments(weight, self.x * factor, self.norm * factor, self.norm2 * factor)

    @property
    def scale(self) -> float:
        """√d_in / E‖x‖."""
        return float(len(self.x) ** 0.5 / (self.norm / self.rows))

    @property
    def mean(self) -> np.ndarray:
        """E x, float32 (d_in,)."""
        mean: np.ndarray = (self.x / self.rows).astype(np.float32)
        return mean

    @property
    def variance(self) -> float:
        """E‖x − E x‖²."""
        return float(self.norm2 / self.rows - ((self.x / self.rows) ** 2).sum())


def add_up(corpora: Iterable[str], moments: Iterable[Moments]) -> dict[str, Moments]:
    """Moments of chunks → of "all" of them, and of each corpus.

    Args:
        corpora: of each chunk.
        moments: of each chunk.
    """
    parts = list(zip(corpora, moments, strict=True))
    # Added chunk by chunk, not corpus by corpus: the scale of the batches hangs on the last digit.
    total = {"all": reduce(add, (part for _, part in parts))}
    for name in CORPORA:
        own = [part for corpus, part in parts if corpus == name]
        if own:
            total[name] = reduce(add, own)
    return total


@dataclass(frozen=True, eq=False)
class Chunk:
    """Activations of a piece of a corpus at one hook point, row by row in the order of its text."""

    activations: np.ndarray
    """(rows, d_in) float32, or int16 that holds bfloat16, which numpy has not."""
    tokens: np.ndarray
    """int32 (rows,) token ids."""
    positions: np.ndarray
    """int32 (rows,) places in the corpus: sequence · seq_len + place in the sequence."""
    moments: Moments


@dataclass(frozen=True)
class Piece:
    """The sequences start to stop of a corpus: what becomes one chunk."""

    corpus: str
    start: int
    stop: int


def pieces_of(lengths: dict[str, int], sequences: int) -> list[Piece]:
    """Both corpora, forget first, cut into pieces of so many sequences.

    Args:
        lengths: number of sequences by corpus.
        sequences: of a piece; the last of a corpus has fewer.
    """
    return [
        Piece(name, start, min(start + sequences, lengths[name]))
        for name in CORPORA
        for start in range(0, lengths[name], sequences)
    ]
