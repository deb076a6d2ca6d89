"""Spectra and coherence of decoder rows, and what random rows of the same size would show.

For a group of features, ``D`` is the matrix of the group's decoder rows scaled to unit norm; its
spectrum is reported through a few scalars. Everything is computed in float64 on the CPU. The
measured spectra come from an SVD of ``D`` itself: the eigenvalues of ``D D^T`` or ``D^T D`` are the
*squares* of the singular values, so a singular value below about ``sqrt(eps) * sigma_max`` (1.5e-8)
would drown in rounding there, and that is where "ill-conditioned" parts from "rank-deficient". Only
the random baseline, whose matrices are well conditioned with few exceptions, goes through the Gram
matrix, under a guard.

Every figure depends on the number of rows: compare groups of one size, or a group with the random
baseline of its size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import scipy.linalg

FloatArray = npt.NDArray[np.float64]
Percentiles = tuple[float, float, float]

BASELINE_FIGURES = (
    "condition_number",
    "numerical_rank",
    "effective_rank",
    "stable_rank",
    "coherence",
)
"""Keys of the dictionary that :func:`random_baseline` returns."""

_COHERENCE_BLOCK = 1024

# A Gram eigenvalue carries an absolute error of order eps * lambda_max, so the relative error of
# the singular value is about eps * (sigma_max / sigma)^2 / 2. Trusting the Gram only down to
# sigma / sigma_max = 1e-3 keeps that near 1e-10 (times a small dimension factor).
_GRAM_SAFE_RATIO = 1e-3


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
    unit, _ = unit_rows(rows)
    return svdvals(unit)


def rank_at(sigma: FloatArray, tolerance: float) -> tuple[int, float]:
    """Numerical rank and condition number of a spectrum at one cut-off.

    Args:
        sigma: singular values, descending.
        tolerance: values count as non-zero above ``tolerance * sigma[0]``.

    Returns:
        (count, sigma_max / sigma_min over the values that count); (0, nan) without a value.
    """
    if not sigma.size:
        return 0, math.nan
    rank = int(np.sum(sigma > tolerance * sigma[0]))
    return rank, float(sigma[0] / sigma[rank - 1])


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
    unit, _ = unit_rows(rows)
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
    unit, n_zero_rows = unit_rows(decoder_rows)
    return figures(unit, svdvals(unit), n_zero_rows, tolerance)


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
        unit, n_zero_rows = unit_rows(rng.standard_normal((n_features, d_in)))
        draws.append(figures(unit, _guarded_gram_spectrum(unit), n_zero_rows, tolerance))
    return tuple(
        (figure, percentiles([getattr(draw, figure) for draw in draws]))
        for figure in BASELINE_FIGURES
    )


def as_matrix(rows: npt.ArrayLike) -> FloatArray:
    """Checked (n, d_in) float64 matrix."""
    matrix = np.asarray(rows, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[1] == 0:
        raise ValueError(f"expected a matrix of shape (n, d_in >= 1), got shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        bad = np.flatnonzero(~np.isfinite(matrix).all(axis=1))
        raise ValueError(f"{bad.size} rows hold nan or infinity, the first is row {bad[0]}")
    return matrix


def unit_rows(rows: npt.ArrayLike) -> tuple[FloatArray, int]:
    """Unit-norm rows (n_nonzero, d_in) and the number of all-zero rows that were dropped."""
    matrix = as_matrix(rows)
    largest = np.abs(matrix).max(axis=1, keepdims=True)
    nonzero = largest[:, 0] > 0
    # Dividing by the largest entry first keeps the squares of tiny or huge rows representable.
    scaled = matrix[nonzero] / largest[nonzero]
    return scaled / np.linalg.norm(scaled, axis=1, keepdims=True), int(np.sum(~nonzero))


def relative_tolerance(tolerance: float | None, n_features: int, d_in: int) -> float:
    if tolerance is None:
        return default_tolerance(n_features, d_in)
    if not 0.0 <= tolerance < 1.0:
        raise ValueError(f"tolerance is relative to sigma_max: in [0, 1), got {tolerance}")
    return float(tolerance)


def percentiles(values: list[float]) -> Percentiles:
    p5, p50, p95 = np.percentile(values, (5, 50, 95))
    return float(p5), float(p50), float(p95)


def svdvals(unit: FloatArray) -> FloatArray:
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
    return svdvals(unit)


def figures(
    unit: FloatArray, sigma: FloatArray, n_zero_rows: int, tolerance: float | None
) -> Conditioning:
    """Conditioning of unit rows (n, d_in) with singular values ``sigma``, descending."""
    n_features, d_in = unit.shape
    relative = relative_tolerance(tolerance, n_features, d_in)
    condition_number = effective_rank = stable_rank = math.nan
    rank = 0
    if n_features:
        rank, condition_number = rank_at(sigma, relative)
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


def _check_size(n_features: int, d_in: int) -> None:
    if n_features < 0 or d_in < 1:
        raise ValueError(f"need n_features >= 0 and d_in >= 1, got {n_features} and {d_in}")
