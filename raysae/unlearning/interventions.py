"""Which interventions have to be run, and what they have in common.

Causal attention makes a row of positions a path: what is computed up to a position follows from the
tokens so far, the features clamped so far and their multiplier. Interventions that agree so far, on
one prompt or on two that begin alike, of one SAE or of several, are one computation up to the
position at which they part. Sorted by path they are a tree, and a row of it lies in one piece.

A processor computes for as long as there are positions. A GPU is asked for a piece in about the
same time however small it is: where that costs more than positions do, prompts of different lengths
share a tree, the shorter ones with positions behind their end that nobody looks at, and it is cut
into fewer pieces.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

CUT_COST, COPY_COST = 0.5, 0.03
"""What parting costs a row, in positions computed: at all, and for each position so far (whose keys
and values are copied). Sums to little for a model of any size; the choice of cuts is not delicate.
"""


def few_sizes(n: int, whole: int) -> int:
    """The least of `whole`, 3/4, 1/2, 3/8, 1/4 … of it, and 0, that is not less than n ≤ whole.

    oneDNN makes code for every number of rows that it is asked for, and keeps it: of even pieces,
    60 to 100 MB for each SAE of another kind (`benchmarks/compiled_layers.py`).
    """
    sizes = [whole]
    while sizes[-1] > 1:
        sizes += [-(-3 * sizes[-1] // 4), -(-sizes[-1] // 2)]
    return min(size for size in (*sizes, 0) if size >= n)


@dataclass(frozen=True)
class Level:
    """One piece of all paths: the positions `start` to `end`, computed once per state."""

    start: int
    end: int
    first: np.ndarray
    """(states,) the first intervention in each state; those in one state follow each other."""
    parents: np.ndarray
    """(states,) the state of the level before from which each one goes on."""

    def chunks(
        self, low: int, high: int, positions: int, held: float = np.inf, *, alike: bool = False
    ) -> Iterator[tuple[int, int, int]]:
        """The states `low` to `high` in pieces: first, end, and how many rows to compute for them.

        Args:
            low: as said.
            high: as said, not included.
            positions: of a piece, about.
            held: at most, with those before `start`, whose keys and values are held too.
            alike: pieces of few sizes, see `few_sizes`, rather than even ones; some rows are then
                for nothing.
        """
        length, n = self.end - self.start, high - low
        if not alike:
            pieces = max(1, round(n * length / positions), int(np.ceil(n * self.end / held)))
            bounds = np.linspace(low, high, min(pieces, n) + 1).astype(int).tolist()
            yield from ((first, end, end - first) for first, end in pairwise(bounds))
            return
        whole = max(1, int(min(round(positions / length), held // self.end)))
        for first in range(low, high, whole):
            end = min(first + whole, high)
            yield first, end, few_sizes(end - first, whole)

    def children(self, low: int, high: int) -> tuple[int, int]:
        """The states of this level that go on from the states `low` to `high` of the one before."""
        found = np.searchsorted(self.parents, [low, high])
        return int(found[0]), int(found[1])


@dataclass(frozen=True)
class Interventions:
    """Distinct interventions on prompts of about one length; what begins alike lies together."""

    length: int
    """Of the longest prompt; the others are filled up."""
    ends: np.ndarray
    """(interventions,) length of the prompt."""
    prompts: np.ndarray
    """(interventions,) position in the cache."""
    saes: np.ndarray
    """(interventions,) position among the SAEs."""
    features: np.ndarray
    """bool (interventions, features): the chosen features that fire somewhere in the prompt."""
    strengths: np.ndarray
    """(interventions, length) the multiplier where a feature is clamped, elsewhere 0."""
    grid_rows: np.ndarray
    """bool (interventions, grid rows): the grid's interventions that amount to this one."""
    departs: np.ndarray
    """(interventions,) first position at which it is not as its predecessor; 0 for the first one,
    `length` for the same question asked twice."""

    def levels(self, piece_cost: float = 0.0) -> list[Level]:
        """The tree in levels, cut where the work saved is worth it.

        In the last one every prompt ends.

        Args:
            piece_cost: of a level, in positions computed.
        """
        states = np.cumsum(np.bincount(self.departs, minlength=self.length)[: self.length])
        levels: list[Level] = []
        before = np.zeros(1, dtype=int)
        for start, end in _cuts(states, piece_cost, int(self.ends.min()) - 1):
            first = np.flatnonzero(self.departs < end)
            parents = np.searchsorted(before, first, side="right") - 1
            levels.append(Level(start, end, first, parents))
            before = first
        return levels


def find_interventions(
    fires: np.ndarray,
    chosen: np.ndarray,
    multipliers: Sequence[int],
    tokens: np.ndarray,
    lengths: np.ndarray,
    asked: np.ndarray,
    piece_cost: float = 0.0,
) -> Iterator[Interventions]:
    """Every intervention that can change an answer, once, by length of the prompt.

    Args:
        fires: bool (prompts, longest, features), the feature fires at that position.
        chosen: bool (saes, grid rows, features), the feature is clamped in that intervention.
        multipliers: (grid rows,).
        tokens: (prompts, longest).
        lengths: (prompts,).
        asked: bool (prompts,), the others are left out.
        piece_cost: of a group, in positions computed: lengths for which that is more than filling
            up the shorter prompts are one group.
    """
    fired, on = _words(fires), _words(chosen)
    somewhere = np.bitwise_or.reduce(fired, axis=1)
    saes, rows, n_features = chosen.shape
    for shortest, length in _groups(lengths[asked], piece_cost / (saes * rows)):
        prompts = np.flatnonzero(asked & (lengths >= shortest) & (lengths <= length))
        patterns = somewhere[prompts][:, None, None] & on
        same_as = _first_of_equals(patterns, multipliers)
        own = same_as == np.arange(len(multipliers))
        prompt, sae, row = np.nonzero(own & patterns.any(axis=-1))
        if not len(prompt):
            continue
        features = patterns[prompt, sae, row]
        factors = np.asarray(multipliers)[row]
        clamped = fired[prompts[prompt], :length] & features[:, None]
        strengths = np.where(clamped.any(axis=-1), factors[:, None], 0)
        ends = lengths[prompts[prompt]]
        own_tokens = np.where(
            np.arange(length) < ends[:, None], tokens[prompts[prompt], :length], -1
        )
        paths = _paths(own_tokens, clamped, strengths)
        keys = [path.tobytes() for path in paths]
        order = np.array(sorted(range(len(keys)), key=keys.__getitem__))
        yield Interventions(
            length=length,
            ends=ends[order],
            prompts=prompts[prompt][order],
            saes=sae[order],
            features=_flags(features[order], n_features),
            strengths=strengths[order],
            grid_rows=(same_as[prompt, sae] == row[:, None])[order],
            departs=_departures(paths[order]),
        )


def _words(flags: np.ndarray) -> np.ndarray:
    """bool (…, n) → uint64 (…, ⌈n / 64⌉), a bit for each."""
    packed = np.packbits(flags, axis=-1)
    filled = np.zeros((*packed.shape[:-1], -(-packed.shape[-1] // 8) * 8), dtype=np.uint8)
    filled[..., : packed.shape[-1]] = packed
    return filled.view(np.uint64)


def _flags(words: np.ndarray, n: int) -> np.ndarray:
    """What `_words` has made of bool (…, n)."""
    return np.unpackbits(words.view(np.uint8), axis=-1, count=n).view(bool)


def _groups(lengths: np.ndarray, cost: float) -> Iterator[tuple[int, int]]:
    """Shortest and longest prompt of each group, which takes less than `cost` to fill up."""
    found, counts = np.unique(lengths, return_counts=True)
    shortest, filled, inside = int(found[0]), 0, int(counts[0])
    for before, length, count in zip(found[:-1], found[1:], counts[1:], strict=True):
        filled += inside * int(length - before)
        if filled < cost:
            inside += int(count)
            continue
        yield shortest, int(before)
        shortest, filled, inside = int(length), 0, int(count)
    yield shortest, int(found[-1])


def _first_of_equals(patterns: np.ndarray, multipliers: Sequence[int]) -> np.ndarray:
    """(prompts, saes, grid rows): the first row of the same features and multiplier as this one.

    Args:
        patterns: (prompts, saes, grid rows, words).
        multipliers: (grid rows,).
    """
    first = np.empty(patterns.shape[:3], dtype=int)
    for row, multiplier in enumerate(multipliers):
        first[..., row] = row
        for earlier in reversed(range(row)):
            if multipliers[earlier] == multiplier:
                equal = (patterns[..., earlier, :] == patterns[..., row, :]).all(axis=-1)
                first[..., row] = np.where(equal, earlier, first[..., row])
    return first


def _paths(tokens: np.ndarray, clamped: np.ndarray, strengths: np.ndarray) -> np.ndarray:
    """uint64 (interventions, length, words): all that each position adds to what is computed.

    Args:
        tokens: (interventions, length).
        clamped: (interventions, length, words).
        strengths: (interventions, length); counts where something is clamped.
    """
    numbers = np.stack([tokens, strengths], axis=-1).astype(np.int32).view(np.uint64)
    return np.concatenate([numbers, clamped], axis=-1)


def _departures(paths: np.ndarray) -> np.ndarray:
    """(interventions,) of sorted paths: where each leaves its predecessor."""
    differs = (paths[1:] != paths[:-1]).any(axis=-1)
    found = np.where(differs.any(axis=1), differs.argmax(axis=1), paths.shape[1])
    return np.concatenate([[0], found])


def _cuts(
    states: np.ndarray, piece_cost: float = 0.0, latest: int | None = None
) -> list[tuple[int, int]]:
    """The pieces (start, end) of least cost.

    Args:
        states: (length,) number of different states at each position. A piece is computed for
            as many rows as there are states at its end.
        piece_cost: of a piece, in positions.
        latest: the last piece starts no later.
    """
    length = len(states)
    latest = length - 1 if latest is None else latest
    cost = np.zeros(length + 1)
    came_from = np.zeros(length + 1, dtype=int)
    starts = np.arange(length)
    for end in range(1, length + 1):
        start = starts[: end if end < length else latest + 1]
        parting = np.where(start > 0, CUT_COST + COPY_COST * start, 0.0)
        costs = cost[start] + states[end - 1] * (end - start + parting) + piece_cost
        came_from[end] = costs.argmin()
        cost[end] = costs[came_from[end]]
    pieces: list[tuple[int, int]] = []
    end = length
    while end:
        pieces.append((int(came_from[end]), end))
        end = pieces[-1][0]
    return pieces[::-1]
