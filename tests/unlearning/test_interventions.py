"""Every intervention is run once, and a shared piece is shared by those that agree, by no other."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from raysae.unlearning.interventions import (
    COPY_COST,
    CUT_COST,
    _cuts,
    few_sizes,
    find_interventions,
)

MULTIPLIERS = (25, 50, 25, 50)


def drawn(seed: int):
    """Prompts over few tokens, so that many begin alike; a feature fires where its token is."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, size=(40, 7))
    tokens[20:25] = tokens[:5]  # the same question twice
    lengths = np.full(40, 7)
    lengths[30:] = 5
    feature_of_token = rng.random((3, 6)) < 0.4
    fires = feature_of_token[tokens]
    fires[:, 0] = False
    fires[30:, 5:] = False
    chosen = rng.random((2, 4, 6)) < 0.6
    chosen[:, :2] = chosen[:, :1]  # the same features under both multipliers
    chosen[0, ..., 3:] = chosen[1, ..., :3] = False  # each SAE has features of its own
    return fires, chosen, tokens, lengths, rng.random(40) < 0.8


def state(fires, clamped, multiplier, tokens, end):
    """What positions before `end` are computed from."""
    on = fires[:end] & clamped
    return tuple(tokens[:end]), on.tobytes(), int(multiplier) if on.any() else 0


@pytest.mark.parametrize("piece_cost", [0.0, 60.0, 1e9])
@pytest.mark.parametrize("seed", range(6))
def test_levels_hold_each_state_once_behind_its_own_past(seed: int, piece_cost: float):
    fires, chosen, tokens, lengths, asked = drawn(seed)
    tokens = np.where(np.arange(tokens.shape[1]) < lengths[:, None], tokens, 7)
    answered, groups = np.zeros((2, 4, 40), dtype=int), 0
    found = find_interventions(fires, chosen, MULTIPLIERS, tokens, lengths, asked, piece_cost)
    for group in found:
        groups += 1
        assert np.array_equal(group.ends, lengths[group.prompts])
        assert group.length >= group.ends.max()
        intervention, row = np.nonzero(group.grid_rows)
        answered[group.saes[intervention], row, group.prompts[intervention]] += 1

        def path(i: int, end: int, group=group):
            prompt = group.prompts[i]
            multiplier = group.strengths[i].max()
            clamps = (fires[prompt], group.features[i], multiplier, tokens[prompt])
            return state(*clamps, end)

        for i, r in zip(intervention, row, strict=True):
            clamps = fires[group.prompts[i]] & chosen[group.saes[i], r]
            assert np.array_equal(clamps, fires[group.prompts[i]] & group.features[i])
            strengths = np.where(clamps.any(axis=1), MULTIPLIERS[r], 0)
            assert np.array_equal(group.strengths[i], strengths[: group.length])
        before, reached = [0], 0
        levels = group.levels(piece_cost)
        assert levels[-1].start < group.ends.min()
        assert piece_cost < 1e9 or len(levels) == 1
        for level in levels:
            assert level.start == reached
            reached = level.end
            everyone = [path(i, level.end) for i in range(len(group.prompts))]
            states = [everyone[i] for i in level.first]
            assert len(states) == len(set(states)) and set(states) == set(everyone)
            for i, parent in zip(level.first, level.parents, strict=True):
                assert path(i, level.start) == path(before[parent], level.start)
            before = level.first.tolist()
        assert reached == group.length
    fires_in = (fires.any(axis=1)[None, None] & chosen[:, :, None]).any(axis=-1)
    assert np.array_equal(answered, (fires_in & asked).astype(int))
    assert groups == (len(set(lengths[asked])) if piece_cost < 1e9 else 1) or piece_cost == 60


def cost(states, pieces):
    return sum(
        states[end - 1] * (end - start + (CUT_COST + COPY_COST * start if start else 0))
        for start, end in pieces
    )


def test_the_cuts_are_the_cheapest():
    states = np.array([1, 1, 2, 9, 10, 40, 41])
    inner = range(1, len(states))
    every = [[c for c in inner if mask >> c & 1] for mask in range(0, 2 ** len(states), 2)]
    costs = [cost(states, zip([0, *cuts], [*cuts, len(states)], strict=True)) for cuts in every]
    found = _cuts(states)
    assert cost(states, found) == pytest.approx(min(costs))
    assert len(found) > 1


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize(("positions", "held"), [(1, np.inf), (6, 12), (6, np.inf), (100, np.inf)])
def test_chunks_cover_the_states_and_children_their_parents(
    positions: int, held: float, alike: bool
):
    fires, chosen, tokens, lengths, asked = drawn(0)
    group = next(iter(find_interventions(fires, chosen, MULTIPLIERS, tokens, lengths, asked)))
    for first, level in pairwise(group.levels()):
        chunks = list(first.chunks(0, len(first.first), positions, held, alike=alike))
        for low, high, rows in chunks:
            assert rows * first.end <= held or high - low == 1
            assert rows == high - low or (alike and high - low < rows < 1.5 * (high - low) + 1)
        assert [i for low, high, _ in chunks for i in range(low, high)] == list(
            range(len(first.first))
        )
        children = [i for low, high, _ in chunks for i in range(*level.children(low, high))]
        assert children == list(range(len(level.first)))


@pytest.mark.parametrize("whole", [1, 7, 79, 1024])
def test_pieces_are_of_few_sizes(whole: int):
    sizes = [few_sizes(n, whole) for n in range(whole + 1)]
    assert (sizes[0], sizes[-1]) == (0, whole)
    assert sizes == sorted(sizes)
    assert all(n <= size < 1.5 * n + 1 for n, size in enumerate(sizes))
    assert len(set(sizes)) <= 2 * math.log2(whole) + 3
