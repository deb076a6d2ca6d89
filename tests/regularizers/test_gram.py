"""The hand-written sums and gradients against plain Gram matrices and finite differences."""

from __future__ import annotations

import pytest
import torch
from regularizer_bench import decoder
from torch import Tensor

from raysae.regularizers.gram import (
    mean_squared_cosine,
    mean_squared_cosine_between,
    mean_squared_cosine_within,
    sum_squared_cosines,
    sum_squared_cosines_between,
    sum_squared_cosines_within,
    unit_rows,
    weighted_mean_squared_cosine,
)

# More rows than columns, fewer, equal, and the smallest.
SHAPES = [(9, 3), (3, 9), (5, 5), (1, 4), (4, 1)]
# With few rows the cosines themselves serve, with many the Gram matrices of both sides.
CROSS_SHAPES = [(3, 4, 9), (9, 8, 3), (12, 2, 3), (1, 9, 2), (6, 6, 3)]


def rows(n: int, d_in: int, seed: int = 0) -> Tensor:
    return decoder(n, d_in, seed).requires_grad_()


@pytest.mark.parametrize(("n", "d_in"), SHAPES)
def test_sum_of_squares_and_its_gradient(n: int, d_in: int):
    U = rows(n, d_in)
    assert torch.autograd.gradcheck(sum_squared_cosines, (U,))
    torch.testing.assert_close(sum_squared_cosines(U), (U @ U.T).pow(2).sum())


@pytest.mark.parametrize(("n", "m", "d_in"), CROSS_SHAPES)
def test_sum_of_squares_between_two_sets_and_its_gradients(n: int, m: int, d_in: int):
    U, V = rows(n, d_in), rows(m, d_in, seed=1)
    assert torch.autograd.gradcheck(sum_squared_cosines_between, (U, V))
    torch.testing.assert_close(sum_squared_cosines_between(U, V), (U @ V.T).pow(2).sum())


def test_both_ways_to_the_sum_between_two_sets_are_tried():
    ways = {n * m <= (n + m) * d_in for n, m, d_in in CROSS_SHAPES}
    assert ways == {True, False}


def test_nothing_against_something_is_zero():
    U, V = rows(0, 4), rows(3, 4)
    total = sum_squared_cosines_between(U, V)
    of_U, of_V = torch.autograd.grad(total, (U, V))
    assert total == 0
    assert of_U.shape == (0, 4)
    assert not of_V.any()


@pytest.mark.parametrize("d_in", [2, 20])
@pytest.mark.parametrize("labels", [[0] * 8, [0, 1] * 4, [3, 3, 0, 1, 1, 1, 3, 5], range(8)])
def test_sums_over_groups_equal_the_masked_gram_matrix(labels: list[int], d_in: int):
    U, groups = unit_rows(rows(8, d_in)), torch.tensor(labels)
    squares = (U @ U.T).pow(2)
    same = groups[:, None] == groups[None, :]
    torch.testing.assert_close(sum_squared_cosines_within(U, groups), squares[same].sum())
    for mean, counted in (
        (mean_squared_cosine_within, same & ~torch.eye(8, dtype=torch.bool)),
        (mean_squared_cosine_between, ~same),
    ):
        wanted = d_in * squares[counted].mean() if counted.any() else squares.sum() * 0
        torch.testing.assert_close(mean(U, groups), wanted)


@pytest.mark.parametrize(("n", "d_in"), [(8, 3), (8, 20)])
def test_means_equal_the_gram_matrix_without_its_diagonal(n: int, d_in: int):
    U = unit_rows(rows(n, d_in))
    squares = (U @ U.T).pow(2).masked_fill(torch.eye(n, dtype=torch.bool), 0)
    torch.testing.assert_close(mean_squared_cosine(U), d_in * squares.sum() / (n * (n - 1)))
    w = torch.linspace(0, 2, n, dtype=torch.float64)
    wanted = d_in * (w[:, None] * w[None, :] * squares).sum() / (n * (n - 1))
    torch.testing.assert_close(weighted_mean_squared_cosine(U, w), wanted)


def test_one_row_alone_has_no_pairs():
    U = unit_rows(rows(1, 4))
    assert mean_squared_cosine(U) == 0
    assert weighted_mean_squared_cosine(U, torch.ones(1)) == 0


def test_unit_rows_keep_zero_rows():
    W = decoder(3, 4)
    W[1] = 0
    U = unit_rows(W)
    torch.testing.assert_close(U.norm(dim=1), torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))
