"""Sparse activations give a regularizer what the same ones laid out give it."""

from __future__ import annotations

import pytest
import torch

from raysae.regularizers.activations import DenseActivations
from raysae.training.sparse import SparseActivations, Support

N, D_SAE = 30, 20


@pytest.fixture
def both() -> tuple[SparseActivations, DenseActivations]:
    """The second of two members; 4 entries a token, of which some are 0."""
    generator = torch.Generator().manual_seed(0)
    indices = torch.rand(2, N, D_SAE, generator=generator).topk(4).indices
    support = Support.from_indices(indices, D_SAE)
    values = torch.rand(2 * N * 4, generator=generator, dtype=torch.float64) - 0.3
    values = values.relu().requires_grad_()
    _, own = support.of_members()
    mine = values.split(support.sizes)[1]
    dense = torch.zeros(N, D_SAE, dtype=torch.float64)
    dense = dense.scatter(1, indices[1], mine.view(N, 4))
    return SparseActivations(own, mine), DenseActivations(dense)


def test_they_lie_where_they_were_picked(both):
    sparse, dense = both
    assert torch.equal(sparse.dense, dense.dense)
    assert (sparse.n, sparse.d_sae) == (dense.n, dense.d_sae) == (N, D_SAE)


def test_sums_by_task_and_their_gradients_agree(both):
    figures, is_forget = torch.linspace(0, 0.5, D_SAE).double(), torch.arange(N) % 3 == 0
    weights = torch.randn(2, D_SAE, generator=torch.Generator().manual_seed(1)).double()
    found = []
    for acts in both:
        excess = (acts.values - acts.of_feature(figures)).relu().pow(2)
        sums = acts.sum_by_task(excess, is_forget)
        (gradient,) = torch.autograd.grad((sums * weights).sum(), acts.values)
        found.append((sums, gradient))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[1][0].abs().sum() > 0
    sparse = both[0]
    picked = found[1][1][sparse._support.rows, sparse._support.features]
    torch.testing.assert_close(found[0][1], picked)


@pytest.mark.parametrize("columns", [7, D_SAE])
def test_products_and_folds_agree(columns, both):
    of = torch.randn(N, 5, generator=torch.Generator().manual_seed(2)).double()
    products, folds = [], []
    for acts in both:
        products.append(acts.transposed_product(acts.values, of))
        folds.append(acts.folded(acts.values, columns))
    torch.testing.assert_close(products[0], products[1])
    torch.testing.assert_close(folds[0], folds[1])
    assert folds[0].shape == (N, columns)


def test_a_stack_s_support_is_that_of_its_members_joined():
    generator = torch.Generator().manual_seed(3)
    chosen = (torch.rand(3, N, D_SAE, generator=generator) < 0.2).flatten().nonzero()[:, 0]
    sizes = tuple(torch.bincount(chosen // (N * D_SAE), minlength=3).tolist())
    whole = Support.from_flat(chosen, sizes, 3, N, D_SAE)
    joined = Support.joined(whole.of_members())
    assert joined.sizes == whole.sizes
    for name in ("features", "rows", "offsets"):
        assert torch.equal(getattr(joined, name), getattr(whole, name)), name


def test_entries_by_feature_are_those_of_a_stable_sort():
    chosen = torch.tensor([3, 19, 20, 23, 63, 119])  # rows 0, 0, 1, 1, 3, 5; most features never
    support = Support.from_flat(chosen, (4, 2), 2, 3, D_SAE)
    order, rows, offsets = support.by_feature
    by_sort = support.features.argsort(stable=True)
    assert torch.equal(order.long(), by_sort)
    assert torch.equal(rows, support.rows[by_sort])
    counts = torch.bincount(support.features, minlength=2 * D_SAE)
    assert torch.equal(offsets, counts.cumsum(0) - counts)


def test_detached_they_carry_no_gradient(both):
    sparse, _ = both
    assert sparse.values.requires_grad
    assert not sparse.detach().values.requires_grad
    assert not sparse.detach().dense.requires_grad
