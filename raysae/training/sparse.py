"""Sparse activations of a stack of SAEs: encode and decode that touch the firing features only.

Of d_sae features a top-k SAE fires k on a token. Its decoder and both weight gradients then need
k / d_sae of the dense products: rows of one matrix are summed as the other's entries say, which
PyTorch has as `embedding_bag`. Only the encoder's pre-activations stay a dense product, because
they decide which features fire.

Members of a stack are handled as one: feature j of member i is row i · d_sae + j of the stacked
decoder, token t of member i is row i · n + t of the stacked batch.
"""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor
from torch.nn.functional import embedding_bag

from raysae.training.dense import product

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
warnings.filterwarnings("ignore", message="Sparse invariant checks are implicitly disabled")


@dataclass(frozen=True)
class Support:
    """Which features fire on which tokens, of all members: an (m · n, m · d_sae) sparsity pattern.

    Entries are sorted by row.
    """

    members: int
    n: int
    """Tokens a member."""
    d_sae: int
    features: Tensor
    """(entries,) column of each entry, int64."""
    rows: Tensor
    """(entries,)"""
    offsets: Tensor
    """(m · n,) first entry of each row."""
    sizes: tuple[int, ...]
    """Entries of each member, which lie in one piece."""

    @classmethod
    def from_flat(
        cls, chosen: Tensor, sizes: tuple[int, ...], members: int, n: int, d_sae: int
    ) -> Support:
        """From positions in the flattened (m, n, d_sae) activations, by row, and how many each
        member has."""
        rows, local = chosen // d_sae, chosen % d_sae
        counts = _count(rows, members * n)
        offsets = counts.cumsum(0) - counts
        return cls(members, n, d_sae, local + (rows // n) * d_sae, rows, offsets, sizes)

    @classmethod
    def from_indices(cls, indices: Tensor, d_sae: int) -> Support:
        """From k features a token, (m, n, k), not offset by member."""
        members, n, k = indices.shape
        device = indices.device
        first = torch.arange(members, device=device)[:, None, None] * d_sae
        offsets = torch.arange(0, members * n * k, k, device=device)
        rows = torch.arange(members * n, device=device)[:, None].expand(-1, k).flatten()
        features = (indices + first).flatten()
        return cls(members, n, d_sae, features, rows, offsets, (n * k,) * members)

    @classmethod
    def joined(cls, supports: list[Support]) -> Support:
        """Of several members, from each one's own."""
        if len(supports) == 1:
            return supports[0]
        n, d_sae = supports[0].n, supports[0].d_sae
        features = torch.cat([s.features + i * d_sae for i, s in enumerate(supports)])
        rows = torch.cat([s.rows + i * n for i, s in enumerate(supports)])
        sizes = tuple(len(s.features) for s in supports)
        starts = itertools.accumulate(sizes, initial=0)
        offsets = torch.cat([s.offsets + start for s, start in zip(supports, starts, strict=False)])
        return cls(len(supports), n, d_sae, features, rows, offsets, sizes)

    def of_members(self) -> list[Support]:
        """Each member's own."""
        parts = zip(
            self.features.split(self.sizes),
            self.rows.split(self.sizes),
            self.offsets.split(self.n),
            self.sizes,
            strict=True,
        )
        supports, start = [], 0
        for i, (features, rows, offsets, size) in enumerate(parts):
            own = (features - i * self.d_sae, rows - i * self.n, offsets - start)
            supports.append(Support(1, self.n, self.d_sae, *own, (size,)))
            start += size
        return supports

    @cached_property
    def by_feature(self) -> tuple[Tensor, Tensor, Tensor]:
        """The transposed pattern: entries in order of their feature, their rows, and the first
        entry of each feature (m · d_sae,)."""
        if not self.features.is_cuda:
            return self._by_feature_on_host()
        order = torch.argsort(self.features, stable=True)
        counts = _count(self.features, self.members * self.d_sae)
        return order, self.rows[order], counts.cumsum(0) - counts

    def _by_feature_on_host(self) -> tuple[Tensor, Tensor, Tensor]:
        """By counting, in a tenth of the time that a sort takes."""
        entries = len(self.features)
        starts = torch.cat([self.offsets, self.offsets.new_full((1,), entries)])
        pattern = (np.arange(entries, dtype=np.int32), self.features.numpy(), starts.numpy())
        shape = (self.members * self.n, self.members * self.d_sae)
        turned = csr_array(pattern, shape=shape).tocsc()
        order, rows, offsets = (turned.data, turned.indices, turned.indptr[:-1])
        return torch.from_numpy(order), torch.from_numpy(rows), torch.from_numpy(offsets)

    def sum_by_feature(self, values: Tensor, of: Tensor) -> Tensor:
        """Transposed pattern · `of`: (m · d_sae, d) sums of the rows of `of` (m · n, d), weighted
        by `values` (entries,)."""
        order, rows, offsets = self.by_feature
        weights = values.index_select(0, order)
        return embedding_bag(rows, of, offsets, mode="sum", per_sample_weights=weights)

    def sampled_product(self, left: Tensor, right: Tensor) -> Tensor:
        """left · rightᵀ at the entries only, (entries,); of (m · n, d) and (m · d_sae, d)."""
        pattern = torch.sparse_csr_tensor(
            torch.cat([self.offsets, self.offsets.new_full((1,), len(self.features))]),
            self.features,
            left.new_zeros(len(self.features)),
            (len(left), len(right)),
            check_invariants=False,
        )
        products: Tensor = torch.sparse.sampled_addmm(pattern, left, right.T, beta=0.0).values()
        return products

    def count_by_feature(self, values: Tensor) -> Tensor:
        """Sums of `values` (entries,) over each feature's entries: (m, d_sae)."""
        sums = values.new_zeros(self.members * self.d_sae)
        return sums.index_add_(0, self.features, values).view(self.members, self.d_sae)

    def dense(self, values: Tensor) -> Tensor:
        """The activations as (m, n, d_sae); differentiable in `values`."""
        flat = values.new_zeros(self.members * self.n * self.d_sae)
        return flat.scatter(0, self._flat, values).view(self.members, self.n, self.d_sae)

    def at(self, dense: Tensor) -> Tensor:
        """(entries,) of activations laid out as (m, n, d_sae)."""
        return dense.flatten().index_select(0, self._flat)

    @cached_property
    def _flat(self) -> Tensor:
        return self.rows * self.d_sae + self.features % self.d_sae


class SparseActivations:
    """One SAE's activations at a support, as `raysae.regularizers.activations.Activations`."""

    def __init__(self, support: Support, values: Tensor) -> None:
        self._support, self.values = support, values
        self.n, self.d_sae = support.n, support.d_sae

    @cached_property
    def dense(self) -> Tensor:
        with torch.enable_grad():  # whoever looks first, a penalty must find a gradient
            return self._support.dense(self.values)[0]

    def detach(self) -> SparseActivations:
        return SparseActivations(self._support, self.values.detach())

    def of_feature(self, figures: Tensor) -> Tensor:
        return figures.index_select(0, self._support.features)

    def sum_by_task(self, values: Tensor, is_forget: Tensor) -> Tensor:
        task = (~is_forget).to(torch.long).index_select(0, self._support.rows)
        sums = values.new_zeros(2 * self.d_sae)
        sums = sums.index_add(0, task * self.d_sae + self._support.features, values)
        return sums.view(2, self.d_sae)

    def transposed_product(self, values: Tensor, of: Tensor) -> Tensor:
        return self._support.sum_by_feature(values, of)

    def folded(self, values: Tensor, columns: int) -> Tensor:
        at = self._support.rows * columns + self._support.features % columns
        return values.new_zeros(self.n * columns).index_add(0, at, values).view(self.n, columns)


def _count(indices: Tensor, size: int) -> Tensor:
    """(size,) how often each of 0 … size − 1 is among `indices`, int64."""
    if not indices.is_cuda:
        return torch.bincount(indices, minlength=size)
    # A GPU's bincount looks for the largest index first, and is waited for.
    return indices.new_zeros(size).index_add_(0, indices, torch.ones_like(indices))


def encode_at(
    support: Support,
    values: Tensor,
    centred: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    *,
    laid_out: torch.dtype | None = None,
) -> Tensor:
    """Pre-activations (entries,) at the support, differentiable in the parameters.

    Args:
        support: which are wanted.
        values: centred · W_enc + b_enc at the support, (entries,), without gradient.
        centred: batch − b_dec, (m, n, d_in), without gradient.
        W_enc, b_enc, b_dec: (m, d_in, d_sae), (m, d_sae), (m, d_in).
        laid_out: make dense products instead of sums over the support, in this dtype.
    """
    encoded: Tensor = _EncodeAt.apply(support, values, centred, W_enc, b_enc, b_dec, laid_out)
    return encoded


def decode(
    support: Support, values: Tensor, W_dec: Tensor, *, laid_out: torch.dtype | None = None
) -> Tensor:
    """activations · W_dec, (m, n, d_in), for activations with `values` (entries,) at the support
    and `W_dec` (m, d_sae, d_in); `laid_out` as above."""
    decoded: Tensor = _Decode.apply(support, values, W_dec, laid_out)
    return decoded


class _EncodeAt(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        support: Support,
        values: Tensor,
        centred: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,  # noqa: ARG004 - its gradient is returned
        b_dec: Tensor,  # noqa: ARG004
        laid_out: torch.dtype | None,
    ) -> Tensor:
        ctx.support, ctx.laid_out = support, laid_out
        ctx.save_for_backward(centred, W_enc)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), support = grads, ctx.support
        centred, W_enc = ctx.saved_tensors
        if ctx.laid_out is None:
            sums = support.sum_by_feature(grad, centred.flatten(0, 1))
            grad_W = sums.view_as(W_enc.mT).mT
        else:
            dense = support.dense(grad.to(ctx.laid_out))
            grad_W = product(centred.to(ctx.laid_out).mT, dense, W_enc.dtype)
        grad_b = support.count_by_feature(grad)
        # b_dec is subtracted from every token alike: what reaches it is summed over tokens first.
        # Member by member: a batched product of such a shape rounds by the number of members.
        grad_b_dec = -torch.stack([W @ g for W, g in zip(W_enc, grad_b, strict=True)])
        return None, None, None, grad_W, grad_b, grad_b_dec, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, support: Support, values: Tensor, W_dec: Tensor, laid_out: torch.dtype | None
    ) -> Tensor:
        ctx.support, ctx.laid_out = support, laid_out
        if laid_out is not None:
            dense, W = support.dense(values.to(laid_out)), W_dec.to(laid_out)
            ctx.save_for_backward(dense, W)
            return product(dense, W, W_dec.dtype)
        ctx.save_for_backward(values, W_dec)
        decoded = embedding_bag(
            support.features,
            W_dec.flatten(0, 1),
            support.offsets,
            mode="sum",
            per_sample_weights=values,
        )
        return decoded.view(support.members, support.n, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        support, grad = ctx.support, grads[0]
        if ctx.laid_out is not None:
            dense, W = ctx.saved_tensors
            narrow = grad.to(ctx.laid_out)
            of_acts = torch.bmm(narrow, W.mT)
            grad_values = support.at(of_acts).to(grad.dtype)
            return None, grad_values, product(dense.mT, narrow, grad.dtype), None
        grad = grad.flatten(0, 1)
        values, W_dec = ctx.saved_tensors
        grad_values = None
        if ctx.needs_input_grad[1]:
            grad_values = support.sampled_product(grad, W_dec.flatten(0, 1))
        grad_W = support.sum_by_feature(values, grad).view_as(W_dec)
        return None, grad_values, grad_W, None
