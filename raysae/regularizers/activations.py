"""Feature activations of a batch as a regularizer sees them: all of them, or what may fire alone.

Whatever is 0 where a feature does not fire is a sum over what fires: of the d_sae activations of a
token a top-k SAE has k. Methods are written for both in terms of `values`: arithmetic on them, with
figures of their features by `of_feature`, and sums by `sum_by_task` and `transposed_product`.
"""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from raysae.products import matmul


class Activations(Protocol):
    """At least 0, in a batch of n tokens."""

    n: int
    d_sae: int

    @property
    def values(self) -> Tensor:
        """(n, d_sae); or (entries,) of those that may be positive, in any order."""
        ...

    @property
    def dense(self) -> Tensor:
        """(n, d_sae)"""
        ...

    def detach(self) -> Activations:
        """The same without gradients."""
        ...

    def of_feature(self, figures: Tensor) -> Tensor:
        """Figures of the features (d_sae,) beside `values`: each one's own."""
        ...

    def sum_by_task(self, values: Tensor, is_forget: Tensor) -> Tensor:
        """(2, d_sae): sums of `values` over forget tokens and over retain tokens.

        Args:
            values: in the place of `self.values`; 0 wherever a feature does not fire.
            is_forget: of every token (n,), bool.
        """
        ...

    def transposed_product(self, values: Tensor, of: Tensor) -> Tensor:
        """(d_sae, d): for every feature the sum over tokens of its value times their row of `of`.

        Args:
            values: as above.
            of: (n, d), without gradient.
        """
        ...

    def folded(self, values: Tensor, columns: int) -> Tensor:
        """(n, columns): every token's `values`, feature j in column j mod `columns`."""
        ...


class DenseActivations:
    """All of them, as a tensor (n, d_sae).

    In float32 at least, since counts over a batch do not fit less; widened where somebody looks.
    """

    def __init__(self, acts: Tensor) -> None:
        self._acts = acts
        self.n, self.d_sae = acts.shape

    @cached_property
    def values(self) -> Tensor:
        with torch.enable_grad():  # whoever looks first, a penalty must find a gradient
            return self._acts.to(torch.promote_types(self._acts.dtype, torch.float32))

    @property
    def dense(self) -> Tensor:
        return self.values

    def detach(self) -> DenseActivations:
        return DenseActivations(self._acts.detach())

    def of_feature(self, figures: Tensor) -> Tensor:
        return figures

    def sum_by_task(self, values: Tensor, is_forget: Tensor) -> Tensor:
        return torch.stack([is_forget, ~is_forget]).to(values.dtype) @ values

    def transposed_product(self, values: Tensor, of: Tensor) -> Tensor:
        return matmul(values.T, of)

    def folded(self, values: Tensor, columns: int) -> Tensor:
        if columns >= self.d_sae:
            return values
        padded = torch.nn.functional.pad(values, (0, -self.d_sae % columns))
        return padded.view(self.n, -1, columns).sum(1)
