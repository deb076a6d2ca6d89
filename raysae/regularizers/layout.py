"""Where the features of each group are: found when labels change, not at every step.

To lay features out by group the host has to know the groups' sizes, and a GPU is waited for until
it does. Labels change every `group_update_period` steps, so what follows from them is kept as long
as they stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Found = TypeVar("Found")

_FOUND = WeakTensorKeyDictionary()


def while_unchanged(labels: Tensor, find: Callable[[Tensor], Found]) -> Found:
    """`find(labels)`, called again only where `labels` has been written to since.

    Args:
        labels: a tensor that stays the same object, as a regularizer's state does.
        find: a function of the module, not made anew for every call.
    """
    version = labels._version
    of_labels = _FOUND.get(labels)
    if of_labels is None or of_labels[0] != version:
        of_labels = _FOUND[labels] = (version, {})
    known = of_labels[1]
    if find not in known:
        known[find] = find(labels)
    found: Found = known[find]
    return found


@dataclass(frozen=True)
class Layout:
    """Features by label."""

    order: Tensor
    """(n,) features, those of the first label first; within a label they keep their order."""
    sizes: tuple[int, ...]
    """Features of each label from 0 on."""

    @property
    def pairs_within(self) -> int:
        """Ordered pairs of two features with the same label."""
        return sum(size * (size - 1) for size in self.sizes)

    @property
    def pairs_between(self) -> int:
        """Ordered pairs of two features with different labels."""
        return sum(self.sizes) ** 2 - sum(size * size for size in self.sizes)

    @cached_property
    def own_size(self) -> Tensor:
        """(n,) for every feature how many share its label, itself included."""
        sizes = torch.tensor(self.sizes, device=self.order.device)
        own = torch.empty_like(self.order)
        own[self.order] = sizes.repeat_interleave(sizes)
        return own

    @cached_property
    def padded(self) -> tuple[Tensor, Tensor | None]:
        """(labels, largest size) features of each label, and which of them are there (…, 1); what
        is missing from the largest size is feature 0; None where nothing is."""
        largest, device = max(self.sizes), self.order.device
        if min(self.sizes) == largest:
            return self.order.view(-1, largest), None
        sizes = torch.tensor(self.sizes)
        place = torch.arange(largest)
        there = place < sizes[:, None]
        first = sizes.cumsum(0) - sizes
        at = torch.where(there, first[:, None] + place, 0).to(device)
        there = there.to(device)
        return torch.where(there, self.order[at], 0), there[..., None]


def layout(labels: Tensor) -> Layout:
    """Of integer labels (n,), at least 0."""
    return while_unchanged(labels, _layout)


def _layout(labels: Tensor) -> Layout:
    sizes = tuple(torch.bincount(labels).tolist())
    return Layout(torch.argsort(labels, stable=True), sizes)
