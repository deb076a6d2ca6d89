"""Features are clustered into subspaces, and overlapping subspaces are pushed apart."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from raysae.products import matmul
from raysae.regularizers.base import State
from raysae.regularizers.gram import unit_rows
from raysae.regularizers.hierarchical import Hierarchical
from raysae.regularizers.layout import layout


class SubspaceClustered(Hierarchical):
    """penalty = ½ · subspace term + ½ · the penalty of `Hierarchical`.

    A group's subspace is spanned by the leading `subspace_rank` right singular vectors Q of its
    unit rows, recomputed with the groups. Subspace term: d_in · mean over ordered pairs of groups
    a ≠ b of strength_ab · mean over i in a of ‖Q_b u_i‖² / k_b. strength_ab is the measured overlap
    ‖Q_a Q_bᵀ‖²_F / min(k_a, k_b), scaled to mean 1 over the pairs: what overlaps most is pushed
    hardest. Random directions in random subspaces cost 1.

    Source: subspace clustering, which the seed study (docs/seed_study.md) proposes as run 10 and
    never ran; it gives no formula.
    """

    name: ClassVar[str] = "subspace_clustered"
    searchable: ClassVar[frozenset[str]] = Hierarchical.searchable | {"subspace_rank"}

    subspace_rank: int = Field(8, ge=1, description="dimensions of a group's subspace, at most")

    def init_state(self, d_in: int, d_sae: int, device: torch.device) -> State:
        rank = min(self.subspace_rank, d_in)
        return super().init_state(d_in, d_sae, device) | {
            "bases": torch.zeros(self.n_groups, rank, d_in, device=device),
            "strength": torch.zeros(self.n_groups, self.n_groups, device=device),
        }

    def regrouped(self, state: State, W_dec: Tensor) -> None:
        super().regrouped(state, W_dec)
        U, bases = unit_rows(W_dec).to(state["bases"].dtype), state["bases"].zero_()
        for group in range(self.n_groups):
            basis = leading_directions(U[state["groups"] == group], bases.shape[1])
            bases[group, : len(basis)] = basis
        ranks = dimensions(bases)
        overlap = torch.einsum("ard,bsd->abrs", bases, bases).pow(2).sum((2, 3))
        overlap /= torch.minimum(ranks[:, None], ranks[None, :]).clamp_min(1)
        overlap.fill_diagonal_(0)
        exists = ranks > 0
        pairs = (exists.sum() * (exists.sum() - 1)).clamp_min(1)
        mean = overlap.sum() / pairs
        state["strength"].copy_(torch.where(mean > 0, overlap / mean.clamp_min(1e-12), overlap))

    def decoder_penalty(self, W_dec: Tensor, state: State) -> Tensor:
        bases, groups = state["bases"].to(W_dec.dtype), state["groups"]
        U, ranks = unit_rows(W_dec), dimensions(bases)
        projected = matmul(U, bases.flatten(0, 1).T).pow(2).view(len(U), *bases.shape[:2]).sum(2)
        energy = projected / ranks.clamp_min(1)
        exists = ranks > 0
        pairs = (exists.sum() * (exists.sum() - 1)).clamp_min(1)
        weights = state["strength"].to(W_dec.dtype)[groups] / layout(groups).own_size[:, None]
        subspace = (weights * energy).sum() * W_dec.shape[1] / pairs
        total: Tensor = 0.5 * subspace + 0.5 * super().decoder_penalty(W_dec, state)
        return total


def leading_directions(rows: Tensor, rank: int) -> Tensor:
    """Orthonormal leading right singular vectors (at most `rank`, d_in) of `rows` (n, d_in).

    From the eigenvectors of the smaller Gram matrix; directions without numerical weight (squared
    singular value below 1e-6 of the largest) are left out.
    """
    n, d_in = rows.shape
    if n == 0:
        return rows.new_zeros(0, d_in)
    exact = rows.double()
    if n < d_in:
        values, vectors = torch.linalg.eigh(exact @ exact.T)
        vectors = exact.T @ vectors / values.clamp_min(1e-12).sqrt()
    else:
        values, vectors = torch.linalg.eigh(exact.T @ exact)
    kept = values > 1e-6 * values[-1]
    directions: Tensor = vectors[:, kept].flip(1)[:, :rank].T.to(rows.dtype)
    return directions


def dimensions(bases: Tensor) -> Tensor:
    """Number of non-zero rows of each basis (groups, rank, d_in), as (groups,) of its dtype."""
    return (bases.pow(2).sum(2) > 0.5).sum(1).to(bases.dtype)
