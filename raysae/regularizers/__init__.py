"""Orthogonality regularizers, one method a file. A new one: its file, and a line in `REGISTRY`."""

from __future__ import annotations

from raysae.regularizers.adaptive_orthogonal import AdaptiveOrthogonal
from raysae.regularizers.base import Regularizer, State
from raysae.regularizers.fixed_orthogonal import FixedOrthogonal
from raysae.regularizers.grouped import Grouped
from raysae.regularizers.none import NoRegularizer

REGISTRY: dict[str, type[Regularizer]] = {
    method.name: method
    for method in (
        NoRegularizer,
        FixedOrthogonal,
        AdaptiveOrthogonal,
        Grouped,
    )
}

__all__ = ["REGISTRY", "Regularizer", "State"]
