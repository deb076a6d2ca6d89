"""Sums of squared cosines between decoder rows, without the d_sae × d_sae Gram matrix.

For unit rows U, Σ_ij (u_i·u_j)² = ‖UUᵀ‖²_F = ‖UᵀU‖²_F: the smaller side serves. All penalties are
given in units of what random directions have: E[(u·v)²] = 1/d_in for independent directions, so
`d_in · mean cos²` is 1 for a random decoder of any size and 0 for an orthogonal one.

The sums bring their own gradients, which reuse the Gram matrix of the forward pass: two matrix
products instead of autograd's three.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raysae.products import matmul
from raysae.regularizers.layout import layout


def unit_rows(W: Tensor) -> Tensor:
    """Rows of `W` (n, d_in) scaled to norm 1; a zero row stays zero."""
    return torch.nn.functional.normalize(W, dim=-1)


def sum_squared_cosines(U: Tensor) -> Tensor:
    """Σ_ij (u_i·u_j)² over all ordered pairs, i = j included, for rows `U` (n, d_in)."""
    total: Tensor = _SquaredGram.apply(U)
    return total


def sum_squared_cosines_between(U: Tensor, V: Tensor) -> Tensor:
    """Σ_ij (u_i·v_j)² for rows `U` (n, d_in) and `V` (m, d_in)."""
    total: Tensor = _SquaredCrossGram.apply(U, V)
    return total


def sum_squared_cosines_within(U: Tensor, groups: Tensor) -> Tensor:
    """Σ over ordered pairs with equal group label, i = j included.

    Args:
        U: unit rows (n, d_in).
        groups: integer labels (n,).
    """
    by_group = layout(groups)
    total: Tensor = _SquaredGrams.apply(U.index_select(0, by_group.order), by_group.sizes)
    return total


def mean_squared_cosine(U: Tensor) -> Tensor:
    """d_in · mean over i ≠ j of (u_i·u_j)² for unit rows `U` (n, d_in); 0 for fewer than two."""
    n, d_in = U.shape
    if n < 2:
        return U.sum() * 0
    return (sum_squared_cosines(U) - n) * (d_in / (n * (n - 1)))


def mean_squared_cosine_within(U: Tensor, groups: Tensor) -> Tensor:
    """The same over pairs i ≠ j with equal label; 0 without any."""
    total = sum_squared_cosines_within(U, groups) - len(U)
    return _ratio(total * U.shape[1], layout(groups).pairs_within)


def mean_squared_cosine_between(U: Tensor, groups: Tensor) -> Tensor:
    """The same over pairs with different labels; 0 without any."""
    total = sum_squared_cosines(U) - sum_squared_cosines_within(U, groups)
    return _ratio(total * U.shape[1], layout(groups).pairs_between)


def weighted_mean_squared_cosine(U: Tensor, weights: Tensor) -> Tensor:
    """d_in · mean over i ≠ j of w_i w_j (u_i·u_j)²; rows are scaled by √w and share one Gram.

    Args:
        U: unit rows (n, d_in).
        weights: (n,), at least 0.
    """
    n, d_in = U.shape
    if n < 2:
        return U.sum() * 0
    total = sum_squared_cosines(U * weights.sqrt()[:, None]) - weights.pow(2).sum()
    return total * (d_in / (n * (n - 1)))


def _ratio(total: Tensor, count: int) -> Tensor:
    return total / count if count else total * 0


class _SquaredGram(torch.autograd.Function):
    """‖UUᵀ‖²_F; its gradient is 4 U UᵀU."""

    @staticmethod
    def forward(ctx: Any, U: Tensor) -> Tensor:
        wide = U.shape[1] < U.shape[0]
        gram = matmul(U.T, U) if wide else matmul(U, U.T)
        ctx.save_for_backward(U, gram)
        ctx.wide = wide
        return gram.pow(2).sum()

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        U, gram = ctx.saved_tensors
        product = matmul(U, gram) if ctx.wide else matmul(gram, U)
        gradient: Tensor = product.mul_(4 * grad[0])
        return gradient


class _SquaredGrams(torch.autograd.Function):
    """Σ ‖PPᵀ‖²_F over the parts P of U (n, d_in), `sizes` rows each; its gradient is 4 P PᵀP.

    One function for all, since groups are small and many.
    """

    @staticmethod
    def forward(ctx: Any, U: Tensor, sizes: tuple[int, ...]) -> Tensor:
        grams = [
            matmul(part.T, part) if len(part) > part.shape[1] else matmul(part, part.T)
            for part in U.split(list(sizes))
        ]
        ctx.save_for_backward(U, *grams)
        ctx.sizes = sizes
        squares = [torch.vdot(gram.flatten(), gram.flatten()) for gram in grams]
        return torch.stack(squares).sum() if squares else U.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None]:
        U, *grams = ctx.saved_tensors
        parts = zip(U.split(list(ctx.sizes)), grams, strict=True)
        gradient = torch.cat(
            [
                matmul(part, gram) if len(part) > part.shape[1] else matmul(gram, part)
                for part, gram in parts
            ]
        )
        return gradient.mul_(4 * grad[0]), None


class _SquaredCrossGram(torch.autograd.Function):
    """‖UVᵀ‖²_F; its gradients are 2 U VᵀV and 2 V UᵀU."""

    @staticmethod
    def forward(ctx: Any, U: Tensor, V: Tensor) -> Tensor:
        (n, d_in), m = U.shape, len(V)
        ctx.cross = n * m <= (n + m) * d_in
        if ctx.cross:
            cosines = matmul(U, V.T)
            ctx.save_for_backward(U, V, cosines)
            return cosines.pow(2).sum()
        of_U, of_V = matmul(U.T, U), matmul(V.T, V)
        ctx.save_for_backward(U, V, of_U, of_V)
        return (of_U * of_V).sum()

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, Tensor]:
        factor = 2 * grad[0]
        if ctx.cross:
            U, V, cosines = ctx.saved_tensors
            return matmul(cosines, V).mul_(factor), matmul(cosines.T, U).mul_(factor)
        U, V, of_U, of_V = ctx.saved_tensors
        return matmul(U, of_V).mul_(factor), matmul(V, of_U).mul_(factor)
