"""Conditioning of a trained SAE's decoder as a tidy table: one row per (trial, step, group)."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from raysae.analysis.spectra import (
    FloatArray,
    as_matrix,
    figures,
    random_baseline,
    rank_at,
    svdvals,
    unit_rows,
)
from raysae.analysis.subspaces import (
    mean_squared_cosine,
    random_overlap,
    select_features,
    subspace_overlap,
)

if TYPE_CHECKING:
    import pandas as pd

TOLERANCES = (1e-6, 1e-3, 1e-2)
"""Further cut-offs of the numerical rank, relative to sigma_max: rank and condition number at each
say how far they hang on the choice."""

_TABLE_BASELINE_FIGURES = ("condition_number", "effective_rank", "stable_rank", "coherence")

COLUMNS: dict[str, str] = {
    "trial": "identifier of the trial, as given by the caller",
    "seed": "index of the SAE in its trial, from 0",
    "step": "training step at which the decoder was taken (steps)",
    "group": '"all", "forget", "retain", "shared", or "group:<k>" for label k',
    "n_features": "non-zero decoder rows in the group (count)",
    "n_zero_rows": "all-zero decoder rows in the group, left out of every figure (count)",
    "condition_number": "sigma_max / sigma_min over the numerically non-zero spectrum (ratio >= 1)",
    "rank_restricted": (
        "True when n_features > numerical_rank: unrestricted condition number infinite (bool)"
    ),
    "numerical_rank": "singular values above tolerance * sigma_max (count)",
    "effective_rank": "exp of the entropy (nats) of sigma / sum(sigma) (count-like, 1..rank)",
    "stable_rank": "||D||_F^2 / sigma_max^2 (count-like, 1..rank)",
    "coherence": "largest off-diagonal |cosine| (0..1; nan below two features)",
    "welch_bound": "least coherence possible for n_features unit rows in d_in dimensions (0..1)",
    "tolerance": "cut-off of the numerical rank, relative to sigma_max (ratio)",
    **{
        f"random_{figure}_p{percentile}": (
            f"{percentile}th percentile of {figure} over random unit rows of the same size"
            f" (unit of {figure}; nan at a step at which the SAE was not scored)"
        )
        for figure in _TABLE_BASELINE_FIGURES
        for percentile in (5, 50, 95)
    },
    **{
        f"{figure}_at_{tolerance:g}": f"{figure} with {tolerance:g} for the tolerance ({unit})"
        for tolerance in TOLERANCES
        for figure, unit in (("numerical_rank", "count"), ("condition_number", "ratio >= 1"))
    },
    "forget_retain_overlap": (
        '||Q_f^T Q_r||_F^2 / min(k_f, k_r) (0..1; nan off the "all" row and if a side is empty)'
    ),
    "forget_retain_chordal_distance": (
        'sqrt(sum of sin^2 of the principal angles) (0..sqrt(min(k_f, k_r)); nan off the "all" row'
        " and if a side is empty)"
    ),
    "smallest_principal_angle": (
        'smallest forget/retain principal angle (radians, 0..pi/2; nan off the "all" row and if a'
        " side is empty)"
    ),
    "median_principal_angle": "the middle one, as above (radians)",
    "largest_principal_angle": "the largest one, as above (radians)",
    "forget_dimension": 'dimension of the forget subspace (count; nan off the "all" row)',
    "retain_dimension": 'dimension of the retain subspace (count; nan off the "all" row)',
    **{
        f"random_overlap_p{percentile}": (
            f"{percentile}th percentile of the overlap of random subspaces of these two dimensions"
            ' (0..1; nan off the "all" row and at a step at which the SAE was not scored)'
        )
        for percentile in (5, 50, 95)
    },
    "forget_retain_squared_cosine": (
        "d_in * mean cos^2 over pairs of a forget and a retain feature (1: as random directions,"
        ' 0: orthogonal; nan off the "all" row and if a side is empty)'
    ),
    "adjusted_rand_index": (
        "agreement of the groups with those of the rung before (1: the same, 0: as by chance; nan"
        ' off the "all" row, at the first rung and without groups)'
    ),
}
"""Columns of :func:`conditioning_table`, in order, with their meaning and unit."""


def conditioning_table(
    decoder: npt.ArrayLike,
    forget_rate: npt.ArrayLike,
    retain_rate: npt.ArrayLike,
    groups: npt.ArrayLike | None = None,
    previous_groups: npt.ArrayLike | None = None,
    *,
    trial: int | str,
    step: int,
    seed: int = 0,
    baseline_draws: int = 20,
    baseline_seed: int = 0,
    threshold: float = 0.5,
    tolerance: float | None = None,
) -> pd.DataFrame:
    """Tidy table of conditioning: one row per (trial, step, group).

    Groups are "all", "forget", "retain", "shared" and, if ``groups`` is given, "group:<k>" for each
    of its labels in ascending order. Features that fire on neither corpus are in "all" only. A
    group without features keeps its row (``n_features`` 0, undefined figures nan), so every table
    of one labelling has the same rows. What is between forget and retain, and the agreement with
    the groups before, stand on the "all" row only.

    Args:
        decoder: (d_sae, d_in) decoder; row i is the direction of feature i.
        forget_rate: (d_sae,) firing rates on forget tokens.
        retain_rate: (d_sae,) firing rates on retain tokens.
        groups: (d_sae,) integer labels, or None.
        previous_groups: the labels at the rung before, or None.
        trial: identifier of the trial, copied to every row.
        step: training step, copied to every row.
        seed: index of the SAE in its trial, copied to every row.
        baseline_draws: draws of :func:`random_baseline` per group; 0: none, its columns are nan.
        baseline_seed: seed of :func:`random_baseline`.
        threshold: selectivity threshold of :func:`select_features`.
        tolerance: relative cut-off of the numerical rank, as in :func:`conditioning`; the baseline
            and the overlap use the same one.

    Returns:
        A DataFrame with exactly the columns of ``COLUMNS``, in that order.

    Raises:
        ValueError: if ``decoder`` is not a finite matrix, if the rates or ``groups`` do not have
            one entry per decoder row, if ``groups`` is not of an integer type, or as the functions
            above.
    """
    # Imported here so that the figures above need numpy and scipy only.
    import pandas as pd

    matrix = as_matrix(decoder)
    d_sae, d_in = matrix.shape
    forget, retain, shared, dead = select_features(forget_rate, retain_rate, threshold)
    if forget.shape != (d_sae,):
        raise ValueError(
            f"forget_rate and retain_rate must have shape ({d_sae},), got {forget.shape}"
        )
    masks = {"all": np.ones(d_sae, dtype=bool), "forget": forget, "retain": retain}
    masks["shared"] = shared
    if groups is not None:
        labels = np.asarray(groups)
        if labels.shape != (d_sae,) or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f"groups must be integers of shape ({d_sae},), got {labels.dtype} of shape "
                f"{labels.shape}"
            )
        for label in np.unique(labels):
            masks[f"group:{int(label)}"] = (labels == label) & ~dead

    between = _between(matrix[forget], matrix[retain], baseline_draws, baseline_seed, tolerance)
    between["adjusted_rand_index"] = _agreement(previous_groups, groups)
    records: list[dict[str, Any]] = []
    for group, mask in masks.items():
        unit, n_zero_rows = unit_rows(matrix[mask])
        sigma = svdvals(unit)
        measured = figures(unit, sigma, n_zero_rows, tolerance)
        baseline = dict.fromkeys(_TABLE_BASELINE_FIGURES, (math.nan,) * 3)
        if baseline_draws:
            baseline = random_baseline(
                measured.n_features, d_in, baseline_draws, baseline_seed, tolerance
            )
        record: dict[str, Any] = {"trial": trial, "seed": seed, "step": step, "group": group}
        record |= asdict(measured)
        for other in TOLERANCES:
            rank, ratio = rank_at(sigma, other)
            record[f"numerical_rank_at_{other:g}"] = rank
            record[f"condition_number_at_{other:g}"] = ratio
        for figure in _TABLE_BASELINE_FIGURES:
            for percentile, value in zip((5, 50, 95), baseline[figure], strict=True):
                record[f"random_{figure}_p{percentile}"] = value
        record |= between if group == "all" else dict.fromkeys(between, math.nan)
        records.append(record)
    return pd.DataFrame.from_records(records, columns=list(COLUMNS))


def _between(
    forget: FloatArray, retain: FloatArray, draws: int, seed: int, tolerance: float | None
) -> dict[str, float]:
    """What the table says about the forget and the retain rows together."""
    pair = subspace_overlap(forget, retain, tolerance)
    angles = pair.principal_angles
    if not angles.size:
        angles = np.full(1, math.nan)
    chance = (math.nan,) * 3
    if draws:
        chance = random_overlap(pair.k_forget, pair.k_retain, forget.shape[1], draws, seed)
    return {
        "forget_retain_overlap": pair.overlap,
        "forget_retain_chordal_distance": pair.chordal_distance,
        "smallest_principal_angle": float(angles[0]),
        "median_principal_angle": float(np.median(angles)),
        "largest_principal_angle": float(angles[-1]),
        "forget_dimension": pair.k_forget,
        "retain_dimension": pair.k_retain,
        **dict(zip((f"random_overlap_p{p}" for p in (5, 50, 95)), chance, strict=True)),
        "forget_retain_squared_cosine": mean_squared_cosine(forget, retain),
    }


def _agreement(previous: npt.ArrayLike | None, groups: npt.ArrayLike | None) -> float:
    """Adjusted Rand index of two labellings; nan without one of them.

    Hubert & Arabie, "Comparing partitions", Journal of Classification 2, 1985.
    """
    if previous is None or groups is None:
        return math.nan
    # Imported here: takes seconds, and only methods that group features need it.
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score(np.asarray(previous), np.asarray(groups)))
