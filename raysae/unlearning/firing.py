"""Which features of an SAE fire, and the activations of a few, without all of `SAE.encode`.

Where a feature's activation does not depend on the others', a few are encoded alone.

Choosing the k largest pre-activations takes PyTorch several times as long as the encoder's product.
On a CPU the least of them is found here by sorting fewer numbers: the maxima of groups of features
bound it from below, and what reaches the bound is seldom twice as much as k. That is SAELens' own
`TopKSAE`; of other SAEs, on a GPU, and where equal activations would have to be told apart, all
features are encoded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sae_lens import JumpReLUSAE, StandardSAE
from sae_lens.saes.topk_sae import TopK, TopKSAE
from torch import Tensor

from raysae.products import preferred

_LARGEST_GROUP = 8
"""Features of which one maximum is taken."""
_GROUPS_FOR_ONE = 2
"""Groups for each of the k: with fewer, the bound is less sharp."""
_ABOVE_ZERO = np.nextafter(np.float32(0), np.float32(1))
"""What is not less fires."""


def count_firing(sae: Any, resid: Tensor, counted: Tensor) -> Tensor:
    """On how many of the counted tokens each feature fires: float32 (d_sae,), exact up to 2^24.

    Args:
        sae: SAELens' or one of SAEBench's custom ones.
        resid: (rows, positions, d_model).
        counted: bool (rows, positions).
    """
    if (found := _largest(sae, resid)) is not None:
        fires = found.values >= found.least[found.tokens]
        fires &= counted.flatten().numpy()[found.tokens]
        counts = np.bincount(found.features[fires], minlength=found.pre.shape[1])
        return torch.from_numpy(counts.astype(np.float32))
    acts = encode(sae, resid).flatten(0, 1)
    # As numbers at once: PyTorch takes longer for truths.
    ones = torch.gt(acts, 0, out=torch.empty(acts.shape, device=acts.device))
    return counted.flatten().float() @ ones


def activations_of(sae: Any, resid: Tensor, features: Tensor) -> Tensor:
    """(rows, positions, features) activations of some features.

    Args:
        sae: SAELens' or one of SAEBench's custom ones.
        resid: (rows, positions, d_model).
        features: int64 (features,).
    """
    if type(sae) in (StandardSAE, JumpReLUSAE) and sae.dtype == torch.float32:
        return _activations_apart(sae, resid, features)
    if (found := _largest(sae, resid)) is None:
        return encode(sae, resid).index_select(2, features)
    chosen = found.pre.index_select(1, features)
    least = torch.from_numpy(found.least)[:, None]
    return chosen.masked_fill_(chosen < least, 0).view(*resid.shape[:2], -1)


def encode(sae: Any, resid: Tensor) -> Tensor:
    """(rows, positions, d_sae) activations, the SAE's own."""
    with preferred():
        acts: Tensor = sae.encode(resid)
    return acts


def _activations_apart(sae: StandardSAE | JumpReLUSAE, resid: Tensor, features: Tensor) -> Tensor:
    """As `activations_of`, as in these SAEs' `encode`."""
    with preferred():
        pre: Tensor = sae.process_sae_in(resid) @ sae.W_enc.detach()[:, features]
    pre += sae.b_enc.detach()[features]
    if isinstance(sae, JumpReLUSAE):
        pre.masked_fill_(pre <= sae.threshold.detach()[features], 0)
    return pre.relu_()


@dataclass(frozen=True)
class _Largest:
    """Each token's k largest pre-activations, as far as they are positive, and a few more."""

    pre: Tensor
    """(tokens, d_sae) pre-activations."""
    least: np.ndarray
    """(tokens,) what is not less is one of them."""
    tokens: np.ndarray
    """int64 (candidates,): all of them, and some that are less."""
    features: np.ndarray
    """int64 (candidates,)"""
    values: np.ndarray
    """(candidates,) pre-activations."""


def _largest(sae: Any, resid: Tensor) -> _Largest | None:
    """None where `SAE.encode` has to be asked."""
    # Not a class derived from it, which may choose otherwise.
    if type(sae) is not TopKSAE or type(sae.activation_fn) is not TopK:
        return None
    k, d_sae = sae.activation_fn.k, len(sae.W_dec)
    groups = _groups(k, d_sae)
    if not groups or not resid.is_cpu or sae.dtype != torch.float32:
        return None
    pre = _pre_activations(sae, resid)
    n, values = len(pre), pre.numpy()
    maxima = pre.view(n, d_sae // groups, groups).amax(dim=1).numpy()
    maxima.sort(axis=1)
    least = np.maximum(maxima[:, -k], _ABOVE_ZERO)
    at = np.flatnonzero(values >= least[:, None])
    tokens, features = np.divmod(at, d_sae)
    values = values.reshape(-1)[at]
    counts = np.bincount(tokens, minlength=n)
    most = int(counts.max(initial=0))
    if most > k:
        rows = np.full((n, most), -np.inf, dtype=np.float32)
        first_of_row = np.arange(n) * most - np.cumsum(counts) + counts
        rows.reshape(-1)[np.arange(len(at)) + first_of_row[tokens]] = values
        rows.sort(axis=1)
        if (np.isfinite(rows[:, -k]) & (rows[:, -k] == rows[:, -k - 1])).any():
            return None  # of equals at the k-th place `SAE.encode` takes some
        least = np.maximum(least, rows[:, -k])
    return _Largest(pre, least, tokens, features, values)


def _pre_activations(sae: TopKSAE, resid: Tensor) -> Tensor:
    """(tokens, d_sae), as in `TopKSAE.encode`."""
    with preferred():
        pre: Tensor = sae.process_sae_in(resid).flatten(0, 1) @ sae.W_enc.detach()
    pre += sae.b_enc.detach()
    if sae.cfg.rescale_acts_by_decoder_norm:
        pre *= sae.W_dec.detach().norm(dim=-1)
    return pre


def _groups(k: int, d_sae: int) -> int:
    """Into how many groups features are divided; 0 where there are too few to do so."""
    sizes = (size for size in range(_LARGEST_GROUP, 1, -1) if d_sae % size == 0)
    return next((d_sae // size for size in sizes if d_sae >= _GROUPS_FOR_ONE * k * size), 0)
