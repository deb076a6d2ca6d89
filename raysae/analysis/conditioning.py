"""Conditioning of SAE decoders: spectra, coherence, and forget/retain subspace overlap.

For a group of features, ``D`` is the matrix of the group's decoder rows scaled to unit norm. This
module reports the spectrum of ``D`` through a few scalars, sets each against random unit rows of
the same size, and measures how far the forget- and retain-selective features share a subspace.

Everything is computed in float64 on the CPU. The measured spectra come from an SVD of ``D`` itself:
the eigenvalues of ``D D^T`` or ``D^T D`` are the *squares* of the singular values, so a singular
value below about ``sqrt(eps) * sigma_max`` (1.5e-8) would drown in rounding there, and that is
where "ill-conditioned" parts from "rank-deficient". Only the random baseline, whose matrices are
well conditioned with few exceptions, goes through the Gram matrix, under a guard.

Every figure depends on the number of rows: compare groups of one size, or a group with the random
baseline of its size.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import scipy.linalg

if TYPE_CHECKING:
    import pandas as pd

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
Percentiles = tuple[float, float, float]

BASELINE_FIGURES = (
    "condition_number",
    "numerical_rank",
    "effective_rank",
    "stable_rank",
    "coherence",
)
"""Keys of the dictionary that :func:`random_baseline` returns."""

_TABLE_BASELINE_FIGURES = ("condition_number", "effective_rank", "coherence")

_COHERENCE_BLOCK = 1024

# A Gram eigenvalue carries an absolute error of order eps * lambda_max, so the relative error of
# the singular value is about eps * (sigma_max / sigma)^2 / 2. Trusting the Gram only down to
# sigma / sigma_max = 1e-3 keeps that near 1e-10 (times a small dimension factor).
_GRAM_SAFE_RATIO = 1e-3

COLUMNS: dict[str, str] = {
    "trial": "identifier of the trial, as given by the caller",
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
            f" (unit of {figure})"
        )
        for figure in _TABLE_BASELINE_FIGURES
        for percentile in (5, 50, 95)
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
}
"""Columns of :func:`conditioning_table`, in order, with their meaning and unit."""


# --- Spectra and coherence ------------------------------------------------------------------------


@dataclass(frozen=True)
class Conditioning:
    """Conditioning of one group of features; see :func:`conditioning` for the edge cases."""

    n_features: int
    """Non-zero rows, the ones that every figure is about (count)."""
    n_zero_rows: int
    """All-zero rows that were dropped, having no direction (count)."""
    condition_number: float
    """sigma_max / sigma_min over the singular values above the tolerance (ratio, >= 1)."""
    rank_restricted: bool
    """True when n_features > numerical_rank, i.e. the rows are linearly dependent and the
    unrestricted condition number is infinite. Always so when n_features > d_in."""
    numerical_rank: int
    """Singular values above ``tolerance * sigma_max`` (count)."""
    effective_rank: float
    """exp(H(sigma / sum sigma)), H in nats (count-like, between 1 and min(n_features, d_in)).
    Roy & Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007."""
    stable_rank: float
    """||D||_F^2 / sigma_max^2 (count-like, between 1 and the rank). Rudelson & Vershynin, "Sampling
    from large matrices", J. ACM 2007."""
    coherence: float
    """max over i != j of |cos(row_i, row_j)| (0..1)."""
    welch_bound: float
    """sqrt((n - d) / (d (n - 1))) for n > d, else 0: no n unit rows in d dimensions have a smaller
    coherence. Welch, "Lower bounds on the maximum cross correlation of signals", IEEE Trans. Inf.
    Theory 20(3), 1974."""
    tolerance: float
    """Relative cut-off that decided the numerical rank (ratio to sigma_max)."""


def spectrum(rows: npt.ArrayLike) -> FloatArray:
    """Singular values of the unit-normalised rows, by SVD.

    Args:
        rows: (n, d_in) real matrix; row i is the direction of feature i. All-zero rows are dropped
            (their number is ``Conditioning.n_zero_rows``).

    Returns:
        (min(n_nonzero, d_in),) float64, descending, dimensionless. Empty if no row is non-zero.

    Raises:
        ValueError: if ``rows`` is not two-dimensional, has no columns, or is not finite.
    """
    unit, _ = _unit_rows(rows)
    return _svdvals(unit)


def default_tolerance(n_features: int, d_in: int) -> float:
    """Relative cut-off max(n, d_in) * eps of the numerical rank, eps that of float64.

    The convention of ``numpy.linalg.matrix_rank``. It covers the rounding of the SVD only. Rows
    that were dependent before they were rounded to float32 have a singular value of about 1e-8 *
    sigma_max, above this cut-off: pass a larger tolerance to count them as dependent.
    """
    return max(n_features, d_in) * float(np.finfo(np.float64).eps)


def mutual_coherence(rows: npt.ArrayLike, block_size: int = _COHERENCE_BLOCK) -> float:
    """Largest |cosine| between two different rows, with memory bounded by ``block_size`` squared.

    Args:
        rows: (n, d_in) real matrix; all-zero rows are dropped.
        block_size: features per block. Only blocks on or above the diagonal are formed, one at a
            time, so the (n, n) matrix of cosines of a large decoder is never held.

    Returns:
        A number in [0, 1]; nan below two non-zero rows, where there is no pair.

    Raises:
        ValueError: as :func:`spectrum`, or if ``block_size`` is below 1.
    """
    unit, _ = _unit_rows(rows)
    return _coherence(unit, block_size)


def welch_bound(n_features: int, d_in: int) -> float:
    """Welch's lower bound on the coherence of unit rows: sqrt((n - d) / (d (n - 1))), 0 for n <= d.

    Welch, "Lower bounds on the maximum cross correlation of signals", IEEE Trans. Inf. Theory 1974.

    Raises:
        ValueError: if ``n_features`` is below 0 or ``d_in`` below 1.
    """
    _check_size(n_features, d_in)
    if n_features <= d_in:
        return 0.0
    return math.sqrt((n_features - d_in) / (d_in * (n_features - 1)))


def conditioning(decoder_rows: npt.ArrayLike, tolerance: float | None = None) -> Conditioning:
    """Conditioning of one group of decoder rows, invariant to row order and to row scale.

    Args:
        decoder_rows: (n, d_in) real matrix; row i is the direction of feature i, at any scale.
        tolerance: singular values count as non-zero above ``tolerance * sigma_max``. None means
            :func:`default_tolerance` of the non-zero rows, max(n, d_in) * eps of float64.

    Returns:
        A :class:`Conditioning`. With one non-zero row, ``coherence`` is nan (there is no pair) and
        the condition number and all three ranks are 1. With none, the condition number, the
        effective and the stable rank and the coherence are nan and the numerical rank is 0.

    Raises:
        ValueError: if ``decoder_rows`` is not a finite matrix with at least one column, or
            ``tolerance`` is outside [0, 1).
    """
    unit, n_zero_rows = _unit_rows(decoder_rows)
    return _figures(unit, _svdvals(unit), n_zero_rows, tolerance)


def random_baseline(
    n_features: int,
    d_in: int,
    n_draws: int = 20,
    seed: int = 0,
    tolerance: float | None = None,
) -> dict[str, Percentiles]:
    """Conditioning of random unit rows of one size: what a group shows with no structure at all.

    Rows are drawn uniformly on the sphere (normalised Gaussians). Results are cached per argument
    tuple; the same arguments always give the same figures. A draw costs O(n d min(n, d)) for the
    spectrum and O(n^2 d) for the coherence, so lower ``n_draws`` for very wide decoders.

    Args:
        n_features: rows per draw.
        d_in: dimension of a row.
        n_draws: independent draws.
        seed: seed of the draws, >= 0; sizes draw independently of each other.
        tolerance: as in :func:`conditioning`.

    Returns:
        For each of ``BASELINE_FIGURES``, the (5th, 50th, 95th) percentile over the draws, in the
        units of :class:`Conditioning`. nan where the figure is undefined for ``n_features``.

    Raises:
        ValueError: if ``n_features`` or ``seed`` is below 0, ``d_in`` or ``n_draws`` below 1, or
            ``tolerance`` outside [0, 1).
    """
    # A fresh dictionary each time: a caller who edits it must not edit the cache.
    return dict(_random_baseline(n_features, d_in, n_draws, seed, tolerance))


@lru_cache(maxsize=4096)
def _random_baseline(
    n_features: int, d_in: int, n_draws: int, seed: int, tolerance: float | None
) -> tuple[tuple[str, Percentiles], ...]:
    _check_size(n_features, d_in)
    if n_draws < 1:
        raise ValueError(f"n_draws must be at least 1, got {n_draws}")
    # The size is part of the seed: with the seed alone, the rows of a smaller baseline would be the
    # first rows of a larger one, and the baselines of a table would err together.
    rng = np.random.default_rng([seed, n_features, d_in])
    draws = []
    for _ in range(n_draws):
        unit, n_zero_rows = _unit_rows(rng.standard_normal((n_features, d_in)))
        draws.append(_figures(unit, _guarded_gram_spectrum(unit), n_zero_rows, tolerance))
    return tuple(
        (figure, _percentiles([getattr(draw, figure) for draw in draws]))
        for figure in BASELINE_FIGURES
    )


# --- Forget and retain subspaces ------------------------------------------------------------------


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
    if q_forget.shape[0] != q_retain.shape[0]:
        raise ValueError(
            f"forget_rows and retain_rows must have equal d_in, got {q_forget.shape[0]} and "
            f"{q_retain.shape[0]}"
        )
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


# --- Table ----------------------------------------------------------------------------------------


def conditioning_table(
    decoder: npt.ArrayLike,
    forget_rate: npt.ArrayLike,
    retain_rate: npt.ArrayLike,
    groups: npt.ArrayLike | None = None,
    *,
    trial: int | str,
    step: int,
    baseline_draws: int = 20,
    baseline_seed: int = 0,
    threshold: float = 0.5,
    tolerance: float | None = None,
) -> pd.DataFrame:
    """Tidy table of conditioning: one row per (trial, step, group).

    Groups are "all", "forget", "retain", "shared" and, if ``groups`` is given, "group:<k>" for each
    of its labels in ascending order. Features that fire on neither corpus are in "all" only. A
    group without features keeps its row (``n_features`` 0, undefined figures nan), so every table
    of one labelling has the same rows. The forget/retain overlap stands on the "all" row only.

    Args:
        decoder: (d_sae, d_in) decoder; row i is the direction of feature i.
        forget_rate: (d_sae,) firing rates on forget tokens.
        retain_rate: (d_sae,) firing rates on retain tokens.
        groups: (d_sae,) integer labels, or None.
        trial: identifier of the trial, copied to every row.
        step: training step, copied to every row.
        baseline_draws: draws of :func:`random_baseline` per group.
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

    matrix = _matrix(decoder)
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

    pair = subspace_overlap(matrix[forget], matrix[retain], tolerance)
    between = {
        "forget_retain_overlap": pair.overlap,
        "forget_retain_chordal_distance": pair.chordal_distance,
        "smallest_principal_angle": (
            float(pair.principal_angles[0]) if pair.principal_angles.size else math.nan
        ),
    }
    records: list[dict[str, Any]] = []
    for group, mask in masks.items():
        measured = conditioning(matrix[mask], tolerance)
        baseline = random_baseline(
            measured.n_features, d_in, baseline_draws, baseline_seed, tolerance
        )
        record: dict[str, Any] = {"trial": trial, "step": step, "group": group, **asdict(measured)}
        for figure in _TABLE_BASELINE_FIGURES:
            for percentile, value in zip((5, 50, 95), baseline[figure], strict=True):
                record[f"random_{figure}_p{percentile}"] = value
        record |= between if group == "all" else dict.fromkeys(between, math.nan)
        records.append(record)
    return pd.DataFrame.from_records(records, columns=list(COLUMNS))


# --- Helpers --------------------------------------------------------------------------------------


def _matrix(rows: npt.ArrayLike) -> FloatArray:
    """Checked (n, d_in) float64 matrix."""
    matrix = np.asarray(rows, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[1] == 0:
        raise ValueError(f"expected a matrix of shape (n, d_in >= 1), got shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        bad = np.flatnonzero(~np.isfinite(matrix).all(axis=1))
        raise ValueError(f"{bad.size} rows hold nan or infinity, the first is row {bad[0]}")
    return matrix


def _unit_rows(rows: npt.ArrayLike) -> tuple[FloatArray, int]:
    """Unit-norm rows (n_nonzero, d_in) and the number of all-zero rows that were dropped."""
    matrix = _matrix(rows)
    largest = np.abs(matrix).max(axis=1, keepdims=True)
    nonzero = largest[:, 0] > 0
    # Dividing by the largest entry first keeps the squares of tiny or huge rows representable.
    scaled = matrix[nonzero] / largest[nonzero]
    return scaled / np.linalg.norm(scaled, axis=1, keepdims=True), int(np.sum(~nonzero))


def _svdvals(unit: FloatArray) -> FloatArray:
    return np.asarray(scipy.linalg.svdvals(unit)) if unit.size else np.empty(0)


def _guarded_gram_spectrum(unit: FloatArray) -> FloatArray:
    """Singular values, descending: from the smaller Gram if that is accurate, else from an SVD."""
    if not unit.size:
        return np.empty(0)
    n, d_in = unit.shape
    gram = unit @ unit.T if n <= d_in else unit.T @ unit
    eigenvalues: FloatArray = scipy.linalg.eigvalsh(gram)
    if eigenvalues[0] > _GRAM_SAFE_RATIO**2 * eigenvalues[-1]:
        return np.asarray(np.sqrt(eigenvalues[::-1]))
    return _svdvals(unit)


def _relative_tolerance(tolerance: float | None, n_features: int, d_in: int) -> float:
    if tolerance is None:
        return default_tolerance(n_features, d_in)
    if not 0.0 <= tolerance < 1.0:
        raise ValueError(f"tolerance is relative to sigma_max: in [0, 1), got {tolerance}")
    return float(tolerance)


def _figures(
    unit: FloatArray, sigma: FloatArray, n_zero_rows: int, tolerance: float | None
) -> Conditioning:
    """Conditioning of unit rows (n, d_in) with singular values ``sigma``, descending."""
    n_features, d_in = unit.shape
    relative = _relative_tolerance(tolerance, n_features, d_in)
    condition_number = effective_rank = stable_rank = math.nan
    rank = 0
    if n_features:
        rank = int(np.sum(sigma > relative * sigma[0]))
        condition_number = float(sigma[0] / sigma[rank - 1])
        share = sigma[sigma > 0] / sigma.sum()
        effective_rank = float(np.exp(-np.sum(share * np.log(share))))
        # ||D||_F^2 is the number of rows, since each has unit norm.
        stable_rank = float(n_features / sigma[0] ** 2)
    return Conditioning(
        n_features=n_features,
        n_zero_rows=n_zero_rows,
        condition_number=condition_number,
        rank_restricted=n_features > rank,
        numerical_rank=rank,
        effective_rank=effective_rank,
        stable_rank=stable_rank,
        coherence=_coherence(unit, _COHERENCE_BLOCK),
        welch_bound=welch_bound(n_features, d_in),
        tolerance=relative,
    )


def _coherence(unit: FloatArray, block_size: int) -> float:
    """Largest off-diagonal |cosine| of unit rows (n, d_in), block by block."""
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    n = unit.shape[0]
    if n < 2:
        return math.nan
    largest = 0.0
    for i in range(0, n, block_size):
        for j in range(i, n, block_size):
            cosines = unit[i : i + block_size] @ unit[j : j + block_size].T
            if i == j:
                np.fill_diagonal(cosines, 0.0)
            largest = max(largest, float(cosines.max()), -float(cosines.min()))
    # Rounding can push the cosine of parallel rows a few ulp past 1.
    return min(largest, 1.0)


def _row_space(rows: npt.ArrayLike, tolerance: float | None) -> FloatArray:
    """Orthonormal basis (d_in, k) of the span of the rows, k the numerical rank."""
    unit, _ = _unit_rows(rows)
    n, d_in = unit.shape
    relative = _relative_tolerance(tolerance, n, d_in)
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


def _check_size(n_features: int, d_in: int) -> None:
    if n_features < 0 or d_in < 1:
        raise ValueError(f"need n_features >= 0 and d_in >= 1, got {n_features} and {d_in}")


def _percentiles(values: list[float]) -> Percentiles:
    p5, p50, p95 = np.percentile(values, (5, 50, 95))
    return float(p5), float(p50), float(p95)


def _frozen(array: FloatArray) -> FloatArray:
    array.flags.writeable = False
    return array
