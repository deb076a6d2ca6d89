"""Forget- and retain-selective features: which they are, and how far they share a subspace."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import scipy.linalg

from raysae.analysis.spectra import (
    FloatArray,
    Percentiles,
    percentiles,
    relative_tolerance,
    unit_rows,
)

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class SubspaceOverlap:
    """How far two row spaces coincide; see :func:`subspace_overlap` for the empty case."""

    k_forget: int
    """Dimension of the forget subspace: numerical rank of its unit rows (count)."""
    k_retain: int
    """Dimension of the retain subspace (count)."""
    principal_angles: FloatArray
    """(min(k_forget, k_retain),) radians in [0, pi/2], ascending, read-only."""
    chordal_distance: float
    """sqrt(sum of sin^2 of the principal angles), 0..sqrt(min(k_forget, k_retain))."""
    overlap: float
    """||Q_f^T Q_r||_F^2 / min(k_forget, k_retain), the mean squared cosine of the principal angles,
    0 (orthogonal)..1 (one contains the other)."""


def subspace_overlap(
    forget_rows: npt.ArrayLike, retain_rows: npt.ArrayLike, tolerance: float | None = None
) -> SubspaceOverlap:
    """Principal angles, chordal distance and overlap of two groups' row spaces.

    ``Q_f`` and ``Q_r`` are orthonormal bases from the SVD of each side's unit rows, cut at its
    numerical rank. The cosines of the principal angles are the singular values of ``Q_f^T Q_r``;
    angles below pi/4 are taken from the sines instead, since the arc cosine loses half the digits
    near 1 (Bjorck & Golub, "Numerical methods for computing angles between linear subspaces", Math.
    Comp. 27, 1973). Chordal distance: Conway, Hardin & Sloane, "Packing lines, planes, etc.:
    packings in Grassmannian spaces", Exp. Math. 5, 1996.

    A side whose rank is d_in contains every other subspace, so the overlap is then 1 whatever the
    features do, and two subspaces of dimensions k_f + k_r > d_in always share directions. For
    random subspaces the expected overlap is max(k_f, k_r) / d_in.

    Args:
        forget_rows: (n_forget, d_in) decoder rows, at any scale.
        retain_rows: (n_retain, d_in) decoder rows, at any scale.
        tolerance: as in :func:`conditioning`, applied to each side.

    Returns:
        A :class:`SubspaceOverlap`. If a side has no non-zero row, ``overlap`` and
        ``chordal_distance`` are nan and ``principal_angles`` is empty.

    Raises:
        ValueError: as :func:`conditioning`, or if the two sides differ in d_in.
    """
    q_forget = _row_space(forget_rows, tolerance)
    q_retain = _row_space(retain_rows, tolerance)
    _check_widths(q_forget.shape[0], q_retain.shape[0])
    k_forget, k_retain = q_forget.shape[1], q_retain.shape[1]
    k_min = min(k_forget, k_retain)
    if k_min == 0:
        return SubspaceOverlap(k_forget, k_retain, _frozen(np.empty(0)), math.nan, math.nan)

    small, large = (q_forget, q_retain) if k_forget <= k_retain else (q_retain, q_forget)
    cross = large.T @ small
    residual = small - large @ cross
    # Descending cosines and ascending sines both run from the smallest angle to the largest.
    cosines = np.clip(scipy.linalg.svdvals(cross), 0.0, 1.0)
    sines = np.clip(scipy.linalg.svdvals(residual)[::-1], 0.0, 1.0)
    angles = np.where(cosines**2 > 0.5, np.arcsin(sines), np.arccos(cosines))
    return SubspaceOverlap(
        k_forget=k_forget,
        k_retain=k_retain,
        # Sorting matters only where the two formulas meet, at pi/4, within rounding.
        principal_angles=_frozen(np.sort(angles)),
        chordal_distance=float(np.linalg.norm(sines)),
        overlap=float(np.sum(cosines**2) / k_min),
    )


@lru_cache(maxsize=4096)
def random_overlap(
    k_forget: int, k_retain: int, d_in: int, n_draws: int = 20, seed: int = 0
) -> Percentiles:
    """Overlap of two random subspaces of these dimensions, uniform on the Grassmannian.

    Its mean is max(k_forget, k_retain) / d_in; it is 1 where a side fills the space.

    Returns:
        (5th, 50th, 95th) percentile over the draws; nan if a side is empty.

    Raises:
        ValueError: if a dimension is outside 0..d_in, or ``n_draws`` is below 1.
    """
    small, large = sorted((k_forget, k_retain))
    if small < 0 or large > d_in or n_draws < 1:
        raise ValueError(
            f"need 0 <= k <= d_in and n_draws >= 1, got k {k_forget} and {k_retain}, d_in {d_in}, "
            f"n_draws {n_draws}"
        )
    if small == 0:
        return math.nan, math.nan, math.nan
    if large == d_in:
        return 1.0, 1.0, 1.0
    rng = np.random.default_rng([seed, small, large, d_in])
    draws = []
    for _ in range(n_draws):
        basis, _ = np.linalg.qr(rng.standard_normal((d_in, small)))
        # Only the angle between the two matters, so the larger one may be the first axes.
        draws.append(float(np.sum(basis[:large] ** 2) / small))
    return percentiles(draws)


def mean_squared_cosine(forget_rows: npt.ArrayLike, retain_rows: npt.ArrayLike) -> float:
    """d_in times the mean of cos^2 over the pairs of a forget and a retain feature.

    About 1 for random directions and 0 for orthogonal ones, whatever the sizes. The overlap of the
    two row spaces is 1 as soon as one side fills the space; this goes on telling decoders apart.

    Returns:
        A number in [0, d_in]; nan if a side has no non-zero row.

    Raises:
        ValueError: as :func:`subspace_overlap`.
    """
    forget, _ = unit_rows(forget_rows)
    retain, _ = unit_rows(retain_rows)
    _check_widths(forget.shape[1], retain.shape[1])
    if not len(forget) or not len(retain):
        return math.nan
    # sum of cos^2 = ||F R^T||_F^2 = <F^T F, R^T R>: two d_in x d_in matrices at most.
    total = np.sum((forget.T @ forget) * (retain.T @ retain))
    return float(total / (len(forget) * len(retain)) * forget.shape[1])


def selectivity(forget_rate: npt.ArrayLike, retain_rate: npt.ArrayLike) -> FloatArray:
    """Selectivity (p_f - p_r) / (p_f + p_r) of each feature: 1 fires on forget tokens only, -1 on
    retain tokens only, 0 on both alike.

    Args:
        forget_rate: (d_sae,) share of forget tokens on which the feature fires, >= 0.
        retain_rate: (d_sae,) share of retain tokens on which the feature fires, >= 0.

    Returns:
        (d_sae,) float64 in [-1, 1]; 0 where both rates are 0.

    Raises:
        ValueError: if the two differ in shape, are not vectors, or are negative or not finite.
    """
    p_forget, p_retain = _rates(forget_rate, retain_rate)
    total = p_forget + p_retain
    return np.divide(p_forget - p_retain, total, out=np.zeros_like(total), where=total > 0)


def select_features(
    forget_rate: npt.ArrayLike, retain_rate: npt.ArrayLike, threshold: float = 0.5
) -> tuple[BoolArray, BoolArray, BoolArray, BoolArray]:
    """Split features into forget-selective, retain-selective, shared and dead.

    Args:
        forget_rate: (d_sae,) firing rates on forget tokens, >= 0.
        retain_rate: (d_sae,) firing rates on retain tokens, >= 0.
        threshold: a feature is forget-selective at selectivity >= threshold and retain-selective at
            selectivity <= -threshold. 0.5 means: fires at least three times as often on one side.

    Returns:
        (forget_mask, retain_mask, shared_mask, dead_mask), each (d_sae,) bool; every feature is in
        exactly one. Dead means both rates are 0.

    Raises:
        ValueError: as :func:`selectivity`, or if ``threshold`` is outside (0, 1].
    """
    if not 0.0 < threshold <= 1.0:
        raise ValueError(f"threshold must lie in (0, 1], got {threshold}")
    p_forget, p_retain = _rates(forget_rate, retain_rate)
    score = selectivity(p_forget, p_retain)
    dead = (p_forget == 0) & (p_retain == 0)
    forget = score >= threshold
    retain = score <= -threshold
    shared = ~(forget | retain | dead)
    return forget, retain, shared, dead


def _row_space(rows: npt.ArrayLike, tolerance: float | None) -> FloatArray:
    """Orthonormal basis (d_in, k) of the span of the rows, k the numerical rank."""
    unit, _ = unit_rows(rows)
    n, d_in = unit.shape
    relative = relative_tolerance(tolerance, n, d_in)
    if n == 0:
        return np.empty((d_in, 0))
    if n > d_in:
        # R of a QR has the same singular values and row space, and is only (d_in, d_in).
        unit = np.asarray(np.linalg.qr(unit, mode="r"))
    _, sigma, vt = scipy.linalg.svd(unit, full_matrices=False)
    return np.asarray(vt[: int(np.sum(sigma > relative * sigma[0]))].T)


def _rates(forget_rate: npt.ArrayLike, retain_rate: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    p_forget = np.asarray(forget_rate, dtype=np.float64)
    p_retain = np.asarray(retain_rate, dtype=np.float64)
    if p_forget.ndim != 1 or p_forget.shape != p_retain.shape:
        raise ValueError(
            "forget_rate and retain_rate must be vectors of one length, got shapes "
            f"{p_forget.shape} and {p_retain.shape}"
        )
    for name, rate in (("forget_rate", p_forget), ("retain_rate", p_retain)):
        if not (np.isfinite(rate).all() and (rate >= 0).all()):
            raise ValueError(f"{name} must be finite and non-negative")
    return p_forget, p_retain


def _frozen(array: FloatArray) -> FloatArray:
    array.flags.writeable = False
    return array


def _check_widths(forget: int, retain: int) -> None:
    if forget != retain:
        raise ValueError(
            f"forget_rows and retain_rows must have equal d_in, got {forget} and {retain}"
        )
