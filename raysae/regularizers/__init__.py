"""Orthogonality regularizers, one method a file. A new one: its file, and a line in `REGISTRY`."""

from __future__ import annotations

from raysae.regularizers.adaptive_orthogonal import AdaptiveOrthogonal
from raysae.regularizers.base import Regularizer, State, StepView
from raysae.regularizers.cross_task_inhibition import CrossTaskInhibition
from raysae.regularizers.fixed_orthogonal import FixedOrthogonal
from raysae.regularizers.gradient_disentangled import GradientDisentangled
from raysae.regularizers.grouped import Grouped
from raysae.regularizers.hierarchical import Hierarchical
from raysae.regularizers.importance import Importance
from raysae.regularizers.none import NoRegularizer
from raysae.regularizers.ortsae_chunked import OrtSAEChunked
from raysae.regularizers.subspace_clustered import SubspaceClustered
from raysae.regularizers.task_masked import TaskMasked

REGISTRY: dict[str, type[Regularizer]] = {
    method.name: method
    for method in (
        NoRegularizer,
        FixedOrthogonal,
        OrtSAEChunked,
        AdaptiveOrthogonal,
        Grouped,
        TaskMasked,
        Importance,
        Hierarchical,
        CrossTaskInhibition,
        GradientDisentangled,
        SubspaceClustered,
    )
}

__all__ = ["REGISTRY", "Regularizer", "State", "StepView"]
