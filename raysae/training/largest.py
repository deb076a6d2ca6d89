"""The largest entries: of every row, and of a whole batch.

On a CPU `topk` compares entry by entry, and takes longer than the product that made them. NumPy
sorts a row of up to 256 numbers in vector registers where the processor has AVX-512; what is longer
is cut into groups first: whatever lies outside the k groups with the largest maxima is below k
others. NaN counts as the largest of all, as it does for `topk`.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

SORTED = 256
"""Entries of a row up to which they are sorted rather than cut into groups, if they have to be."""


def largest_of_rows(x: Tensor, k: int) -> Tensor:
    """Columns of the k largest entries of every row of `x` (n, d): (n, k) int64, in no order."""
    if not _sorts_fast(x):
        return x.topk(k, sorted=False).indices
    (n, d), width = x.shape, 1
    while d > SORTED and 4 * width * width * k <= d and d % (2 * width) == 0:
        width *= 2  # of a group; both stages then see about √(k · d) entries
    if width == 1:
        return _by_sort(x, k)
    groups = largest_of_rows(x.view(n, width, -1).amax(1), k)
    entries = (groups[:, None] + torch.arange(0, d, d // width)[:, None]).flatten(1)
    return entries.gather(1, largest_of_rows(x.gather(1, entries), k))


def largest(x: Tensor, k: int) -> Tensor:
    """Indices of the k largest entries of `x` (size,): ascending on a CPU, else in no order."""
    if x.is_cuda:
        return x.topk(k, sorted=False).indices
    x = x.float() if x.dtype == torch.bfloat16 else x  # which NumPy does not have
    width = 1
    while 8 * width * k <= len(x) and len(x) % (2 * width) == 0:
        width *= 2  # of a group; there are four times as many of them as are wanted
    bound = _kth_largest(x.view(width, -1).amax(0), k)
    if math.isnan(bound):
        return x.topk(k, sorted=False).indices.sort().values
    values = x.numpy()
    candidates = np.flatnonzero(values >= bound)
    values = values[candidates]
    least = _kth_largest(torch.from_numpy(values), k)
    kept = values > least
    kept[np.flatnonzero(values == least)[: k - np.count_nonzero(kept)]] = True
    return torch.from_numpy(candidates[kept])


def _kth_largest(x: Tensor, k: int) -> float:
    """Of `x` (size,); NaN if it has one."""
    if not _sorts_fast(x):
        return float(x.topk(k, sorted=False).values.min())
    ordered = np.sort(x.numpy())
    return float(ordered[-1] if np.isnan(ordered[-1]) else ordered[-k])


def _by_sort(x: Tensor, k: int) -> Tensor:
    """As `largest_of_rows`, from whole rows."""
    if x.shape[1] > SORTED or x.sum().isnan():
        return x.topk(k, sorted=False).indices
    # Numbers that order as the entries do, with the column in the lower half.
    bits = x.contiguous().view(torch.int32)
    bits = bits ^ (bits >> 31).bitwise_and_(0x7FFFFFFF)
    keys = bits.long().bitwise_left_shift_(32).bitwise_or_(torch.arange(x.shape[1]))
    keys.numpy().sort(axis=1)
    return keys[:, -k:].bitwise_and(0xFFFFFFFF)


def _sorts_fast(x: Tensor) -> bool:
    """Whether NumPy's sort of such entries uses AVX-512."""
    fast = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return fast and x.is_cpu and x.dtype == torch.float32
