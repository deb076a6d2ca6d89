"""Sums of squared cosines between decoder rows, without the d_sae × d_sae Gram matrix.

For unit rows U, Σ_ij (u_i·u_j)² = ‖UUᵀ‖²_F = ‖UᵀU‖²_F: the right-hand side is d_in × d_in. All
penalties are given in units of what random directions have: E[(u·v)²] = 1/d_in for independent
directions, so `d_in · mean cos²` is 1 for a random decoder of any size and 0 for an orthogonal one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unit_rows(W: Tensor) -> Tensor:
    """Rows of `W` (n, d_in) scaled to norm 1; a zero row stays zero."""
    return torch.nn.functional.normalize(W, dim=-1)


def sum_squared_cosines(U: Tensor) -> Tensor:
    """Σ_ij (u_i·u_j)² over all ordered pairs, i = j included, for unit rows `U` (n, d_in)."""
    n, d_in = U.shape
    gram = U.T @ U if d_in < n else U @ U.T
    return gram.pow(2).sum()


def sum_squared_cosines_within(U: Tensor, groups: Tensor) -> Tensor:
    """Σ over ordered pairs with equal group label, i = j included.

    Args:
        U: unit rows (n, d_in).
        groups: integer labels (n,).
    """
    labels = torch.unique(groups)
    parts = [sum_squared_cosines(U[groups == label]) for label in labels]
    return torch.stack(parts).sum() if parts else U.new_zeros(())
