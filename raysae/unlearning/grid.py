"""SAEBench's grid of interventions: which features, how many, how strongly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sae_bench.evals.unlearning.eval_config import UnlearningEvalConfig
from sae_bench.evals.unlearning.utils.feature_activation import get_top_features


@dataclass(frozen=True)
class GridPoint:
    """One requested intervention: SAEBench's three dials and the features they select."""

    retain_threshold: float
    n_features: int
    multiplier: int
    features: tuple[int, ...]


def choose_features(
    forget_sparsity: np.ndarray, retain_sparsity: np.ndarray, config: UnlearningEvalConfig
) -> tuple[GridPoint, ...]:
    """Every intervention of the grid with its features, in the order SAEBench runs them.

    Args:
        forget_sparsity, retain_sparsity: (d_sae,) as read back from SAEBench's text files.
        config: thresholds, feature counts and multipliers.

    SAEBench's own `get_top_features` chooses: features that fire on less than the threshold's
    share of the retain tokens, the most frequent on the forget tokens first, none that never fires
    there.
    """
    points = []
    for threshold in config.retain_thresholds:
        top = get_top_features(forget_sparsity, retain_sparsity, retain_threshold=threshold)
        for n in config.n_features_list:
            features = tuple(int(f) for f in top[:n])
            points += [GridPoint(threshold, n, m, features) for m in config.multipliers]
    return tuple(points)


def eligible_features(
    forget_sparsity: np.ndarray, retain_sparsity: np.ndarray, config: UnlearningEvalConfig
) -> dict[float, int]:
    """By retain threshold, how many features SAEBench could choose from."""
    return {
        threshold: len(get_top_features(forget_sparsity, retain_sparsity, threshold))
        for threshold in config.retain_thresholds
    }
