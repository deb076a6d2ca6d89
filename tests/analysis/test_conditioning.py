"""Conditioning figures against closed forms and naive float64 references."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.linalg

from raysae.analysis.spectra import (
    BASELINE_FIGURES,
    Conditioning,
    _guarded_gram_spectrum,
    conditioning,
    mutual_coherence,
    random_baseline,
    spectrum,
    welch_bound,
)
from raysae.analysis.subspaces import (
    mean_squared_cosine,
    random_overlap,
    select_features,
    selectivity,
    subspace_overlap,
)


def gaussian(n: int, d_in: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d_in))


def orthonormal_rows(n: int, d_in: int, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(gaussian(d_in, d_in, seed))[0][:n]


def simplex_frame(d_in: int) -> np.ndarray:
    """d_in + 1 unit vectors in d_in dimensions, every pair at cosine -1/d_in."""
    n = d_in + 1
    centred = np.eye(n) - 1.0 / n
    basis = np.linalg.svd(centred)[2][:d_in]
    return centred @ basis.T


def naive_coherence(rows: np.ndarray) -> float:
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = [abs(unit[i] @ unit[j]) for i in range(len(unit)) for j in range(i)]
    return max(cosines)


def assert_same(first: Conditioning, second: Conditioning, rtol: float = 1e-10) -> None:
    for field in dataclasses.fields(Conditioning):
        a, b = getattr(first, field.name), getattr(second, field.name)
        np.testing.assert_allclose(a, b, rtol=rtol, err_msg=field.name)


# --- Spectrum and figures -------------------------------------------------------------------------


def test_orthonormal_rows_are_perfectly_conditioned():
    result = conditioning(orthonormal_rows(12, 20))
    assert result.condition_number == pytest.approx(1.0, abs=1e-12)
    assert result.effective_rank == pytest.approx(12.0)
    assert result.stable_rank == pytest.approx(12.0)
    assert result.coherence == pytest.approx(0.0, abs=1e-14)
    assert (result.numerical_rank, result.n_features, result.welch_bound) == (12, 12, 0.0)
    assert not result.rank_restricted


def test_two_rows_at_a_known_angle():
    # Two unit rows with cosine c have singular values sqrt(1 + c) and sqrt(1 - c).
    c = 0.6
    result = conditioning([[1.0, 0.0, 0.0], [c, 0.8, 0.0]])
    sigma = np.sqrt([1 + c, 1 - c])
    share = sigma / sigma.sum()
    np.testing.assert_allclose(spectrum([[1.0, 0.0], [c, 0.8]]), sigma, rtol=1e-14)
    assert result.condition_number == pytest.approx(math.sqrt((1 + c) / (1 - c)))
    assert result.effective_rank == pytest.approx(math.exp(-np.sum(share * np.log(share))))
    assert result.stable_rank == pytest.approx(2 / (1 + c))
    assert result.coherence == pytest.approx(c)


def test_figures_equal_a_naive_reference():
    rows = gaussian(9, 6)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    sigma = np.linalg.svd(unit, compute_uv=False)
    share = sigma / sigma.sum()
    result = conditioning(rows)
    np.testing.assert_allclose(spectrum(rows), sigma, rtol=1e-12)
    assert result.condition_number == pytest.approx(sigma[0] / sigma[-1])
    assert result.effective_rank == pytest.approx(math.exp(-np.sum(share * np.log(share))))
    assert result.stable_rank == pytest.approx(np.linalg.norm(unit) ** 2 / sigma[0] ** 2)
    assert result.coherence == pytest.approx(naive_coherence(rows))
    # Nine rows in six dimensions: dependent although the matrix has full rank.
    assert (result.numerical_rank, result.rank_restricted) == (6, True)


def test_duplicated_row_is_rank_deficient_with_coherence_one():
    base = orthonormal_rows(5, 8)
    result = conditioning(np.vstack([base, 3.0 * base[:1]]))
    assert (result.n_features, result.numerical_rank, result.rank_restricted) == (6, 5, True)
    assert result.coherence == pytest.approx(1.0, abs=1e-14)
    # Singular values: sqrt(2) for the doubled direction, 1 for the other four.
    assert result.condition_number == pytest.approx(math.sqrt(2))


def test_rank_deficient_decoder_reports_the_restricted_condition_number():
    rows = gaussian(30, 4) @ gaussian(4, 16, seed=1)
    result = conditioning(rows)
    sigma = spectrum(rows)
    assert sigma.shape == (16,)
    assert (result.numerical_rank, result.rank_restricted) == (4, True)
    assert result.condition_number == pytest.approx(sigma[0] / sigma[3])
    assert 1.0 < result.effective_rank <= 4.0 + 1e-9


@pytest.mark.parametrize("gap", [1e-5, 1e-9, 1e-12])
def test_near_dependence_that_a_gram_could_not_see_is_resolved(gap):
    # Rows (1, 0) and (cos, sin) of a tiny angle: kappa = 1 / tan(angle / 2).
    result = conditioning([[1.0, 0.0], [math.cos(gap), math.sin(gap)]])
    assert not result.rank_restricted
    assert result.condition_number == pytest.approx(1 / math.tan(gap / 2), rel=1e-3)


def test_tolerance_decides_the_rank():
    rows = [[1.0, 0.0], [1.0, 1e-6]]
    assert conditioning(rows).numerical_rank == 2
    restricted = conditioning(rows, tolerance=1e-5)
    assert (restricted.numerical_rank, restricted.rank_restricted) == (1, True)
    assert (restricted.condition_number, restricted.tolerance) == (1.0, 1e-5)
    assert conditioning(rows).tolerance == 2 * np.finfo(np.float64).eps


def test_figures_ignore_scale_and_order_of_rows():
    rows = gaussian(20, 12)
    scales = 10.0 ** np.random.default_rng(1).uniform(-6, 6, size=(20, 1))
    permutation = np.random.default_rng(2).permutation(20)
    assert_same(conditioning(rows), conditioning(rows * scales))
    assert_same(conditioning(rows), conditioning(rows[permutation]))


def test_extreme_row_norms_neither_overflow_nor_underflow():
    rows = gaussian(6, 10)
    scales = np.array([1e-300, 1e300, 1e-200, 1e200, 1.0, 1e-250])[:, None]
    assert_same(conditioning(rows), conditioning(rows * scales))


def test_zero_rows_are_dropped_and_counted():
    rows = gaussian(6, 10)
    padded = np.insert(rows, [0, 3, 6], 0.0, axis=0)
    result = conditioning(padded)
    assert (result.n_features, result.n_zero_rows) == (6, 3)
    assert_same(dataclasses.replace(result, n_zero_rows=0), conditioning(rows))
    assert spectrum(padded).shape == (6,)


def test_small_groups():
    one = conditioning([[0.0, 2.0, 0.0]])
    assert (one.condition_number, one.effective_rank, one.stable_rank) == (1.0, 1.0, 1.0)
    assert (one.numerical_rank, one.rank_restricted, one.welch_bound) == (1, False, 0.0)
    assert math.isnan(one.coherence)
    for none in (conditioning(np.empty((0, 3))), conditioning(np.zeros((2, 3)))):
        assert (none.n_features, none.numerical_rank, none.rank_restricted) == (0, 0, False)
        assert np.isnan([none.condition_number, none.effective_rank, none.stable_rank]).all()
        assert math.isnan(none.coherence)
    assert spectrum(np.empty((0, 3))).shape == (0,)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="matrix of shape"):
        conditioning(np.ones(3))
    with pytest.raises(ValueError, match="first is row 1"):
        conditioning([[1.0, 0.0], [math.nan, 0.0]])
    with pytest.raises(ValueError, match="tolerance"):
        conditioning(np.eye(2), tolerance=1.0)
    with pytest.raises(ValueError, match="block_size"):
        mutual_coherence(np.eye(2), block_size=0)


# --- Coherence and the Welch bound ----------------------------------------------------------------


@pytest.mark.parametrize("d_in", [1, 2, 3, 7])
def test_simplex_frame_reaches_the_welch_bound(d_in):
    result = conditioning(simplex_frame(d_in))
    assert result.welch_bound == pytest.approx(1 / d_in)
    assert result.coherence == pytest.approx(result.welch_bound)
    # A tight frame: all d_in singular values equal.
    assert result.condition_number == pytest.approx(1.0)
    assert result.stable_rank == pytest.approx(d_in)


def test_coherence_never_beats_the_welch_bound():
    for n in (5, 9, 40):
        assert mutual_coherence(gaussian(n, 4)) >= welch_bound(n, 4)
    assert welch_bound(4, 4) == 0.0


@pytest.mark.parametrize("block_size", [1, 2, 7, 36, 37, 1000])
def test_coherence_in_blocks_equals_the_naive_one(block_size):
    rows = gaussian(37, 8)
    assert mutual_coherence(rows, block_size) == pytest.approx(naive_coherence(rows), rel=1e-13)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_coherence_finds_a_parallel_pair_wherever_it_lies(sign):
    for i, j in ((0, 1), (0, 11), (5, 6), (10, 11)):
        rows = orthonormal_rows(12, 16)
        rows[j] = sign * rows[i]
        assert mutual_coherence(rows, block_size=5) == pytest.approx(1.0)


# --- Random baseline ------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d_in"), [(10, 40), (40, 10), (16, 16)])
def test_baseline_equals_direct_draws(n, d_in):
    rng = np.random.default_rng([3, n, d_in])
    draws = [conditioning(rng.standard_normal((n, d_in))) for _ in range(6)]
    baseline = random_baseline(n, d_in, n_draws=6, seed=3)
    assert tuple(baseline) == BASELINE_FIGURES
    for figure, percentiles in baseline.items():
        expected = np.percentile([getattr(draw, figure) for draw in draws], (5, 50, 95))
        np.testing.assert_allclose(percentiles, expected, rtol=1e-8, err_msg=figure)


def test_baseline_follows_marchenko_pastur():
    # Bai-Yin: the extreme singular values tend to 1 +- sqrt(d/n), up to scale.
    ratio = math.sqrt(64 / 1024)
    expected = (1 + ratio) / (1 - ratio)
    assert random_baseline(1024, 64, 5)["condition_number"][1] == pytest.approx(expected, rel=0.05)


def test_baseline_is_cached_and_safe_to_edit():
    first = random_baseline(8, 5, 4)
    first["coherence"] = (0.0, 0.0, 0.0)
    assert random_baseline(8, 5, 4)["coherence"] != (0.0, 0.0, 0.0)
    assert random_baseline(8, 5, 4) == random_baseline(8, 5, 4)
    assert random_baseline(8, 5, 4, seed=1) != random_baseline(8, 5, 4)


def test_baselines_of_neighbouring_sizes_are_drawn_independently():
    # A shared stream would make the wider draw repeat the narrower one's rows, hence its maximum.
    assert random_baseline(60, 8, 4)["coherence"] != random_baseline(61, 8, 4)["coherence"]


def test_baseline_of_small_groups():
    single = random_baseline(1, 5, 3)
    np.testing.assert_allclose(single["condition_number"], 1.0)
    assert np.isnan(single["coherence"]).all()
    assert np.isnan(random_baseline(0, 5, 3)["condition_number"]).all()
    with pytest.raises(ValueError, match="n_draws"):
        random_baseline(3, 5, 0)


@pytest.mark.parametrize("gap", [1.0, 1e-2, 1e-4, 1e-8])
def test_gram_shortcut_gives_way_to_the_svd(gap):
    unit = np.array([[1.0, 0.0, 0.0], [math.cos(gap), math.sin(gap), 0.0]])
    exact = [math.sqrt(2) * math.cos(gap / 2), math.sqrt(2) * math.sin(gap / 2)]
    np.testing.assert_allclose(_guarded_gram_spectrum(unit), exact, rtol=1e-7)


# --- Subspaces ------------------------------------------------------------------------------------


def test_hand_made_principal_angles():
    angles = np.array([1e-10, 1e-4, 0.3, 0.9, math.pi / 2])
    k = angles.size
    rotation = orthonormal_rows(2 * k, 2 * k)
    forget = np.eye(2 * k)[:k] @ rotation
    turned = np.hstack([np.diag(np.cos(angles)), np.diag(np.sin(angles))]) @ rotation
    # Any invertible mix of rows spans the same subspace.
    retain = (gaussian(k, k, seed=4) + 3 * np.eye(k)) @ turned
    result = subspace_overlap(forget, retain)
    assert (result.k_forget, result.k_retain) == (k, k)
    np.testing.assert_allclose(result.principal_angles, angles, rtol=1e-9, atol=1e-14)
    assert result.chordal_distance == pytest.approx(math.sqrt(np.sum(np.sin(angles) ** 2)))
    assert result.overlap == pytest.approx(np.mean(np.cos(angles) ** 2))


@pytest.mark.parametrize(("n_forget", "n_retain"), [(3, 7), (7, 3), (5, 5), (9, 6), (40, 4)])
def test_principal_angles_equal_scipys(n_forget, n_retain):
    forget, retain = gaussian(n_forget, 12), gaussian(n_retain, 12, seed=1)
    result = subspace_overlap(forget, retain)
    # scipy wants independent columns and returns descending angles.
    expected = np.sort(
        scipy.linalg.subspace_angles(scipy.linalg.orth(forget.T), scipy.linalg.orth(retain.T))
    )
    np.testing.assert_allclose(result.principal_angles, expected, atol=1e-13)
    mirrored = subspace_overlap(retain, forget)
    assert mirrored.overlap == pytest.approx(result.overlap)
    assert mirrored.chordal_distance == pytest.approx(result.chordal_distance, abs=1e-13)


def test_equal_orthogonal_and_nested_subspaces():
    basis = orthonormal_rows(8, 8)
    equal = subspace_overlap(basis[:3], gaussian(6, 3) @ basis[:3])
    assert (equal.k_forget, equal.k_retain) == (3, 3)
    assert equal.overlap == pytest.approx(1.0)
    assert equal.chordal_distance == pytest.approx(0.0, abs=1e-13)
    orthogonal = subspace_overlap(basis[:3], basis[3:])
    assert orthogonal.overlap == pytest.approx(0.0, abs=1e-14)
    assert orthogonal.chordal_distance == pytest.approx(math.sqrt(3))
    np.testing.assert_allclose(orthogonal.principal_angles, math.pi / 2)
    assert subspace_overlap(basis[:2], basis[:5]).overlap == pytest.approx(1.0)


def test_empty_side_has_no_overlap():
    for empty in (np.empty((0, 4)), np.zeros((2, 4))):
        result = subspace_overlap(empty, np.eye(4)[:2])
        assert (result.k_forget, result.k_retain) == (0, 2)
        assert result.principal_angles.shape == (0,)
        assert math.isnan(result.overlap) and math.isnan(result.chordal_distance)


def test_overlap_refuses_different_dimensions():
    with pytest.raises(ValueError, match="equal d_in"):
        subspace_overlap(np.eye(3), np.eye(4))


# --- Selectivity ----------------------------------------------------------------------------------


def test_selectivity_closed_form():
    score = selectivity([0.2, 0.0, 0.3, 0.1, 0.0], [0.0, 0.4, 0.1, 0.1, 0.0])
    np.testing.assert_allclose(score, [1.0, -1.0, 0.5, 0.0, 0.0])


def test_masks_are_disjoint_and_cover():
    rng = np.random.default_rng(0)
    p_forget = rng.random(200) * (rng.random(200) > 0.4)
    p_retain = rng.random(200) * (rng.random(200) > 0.4)
    masks = select_features(p_forget, p_retain)
    np.testing.assert_array_equal(np.sum(masks, axis=0), 1)
    forget, retain, _, dead = masks
    assert all(mask.any() and mask.dtype == bool for mask in masks)
    np.testing.assert_array_equal(dead, (p_forget == 0) & (p_retain == 0))
    # Selectivity 0.5 means three times as often, and the bound itself counts.
    assert (p_forget[forget] >= 3 * p_retain[forget] - 1e-12).all()
    assert (p_retain[retain] >= 3 * p_forget[retain] - 1e-12).all()
    assert select_features([0.75], [0.25])[0].all()


def test_bad_rates_are_refused():
    with pytest.raises(ValueError, match="one length"):
        selectivity([0.1, 0.2], [0.1])
    with pytest.raises(ValueError, match="retain_rate"):
        selectivity([0.1], [-0.1])
    with pytest.raises(ValueError, match="forget_rate"):
        selectivity([math.nan], [0.1])
    with pytest.raises(ValueError, match="threshold"):
        select_features([0.1], [0.1], threshold=0.0)


@pytest.mark.parametrize(("n_forget", "n_retain"), [(3, 5), (8, 2), (20, 30)])
def test_mean_squared_cosine_is_the_mean_over_all_pairs(n_forget: int, n_retain: int):
    forget, retain = gaussian(n_forget, 7, 1), gaussian(n_retain, 7, 2)
    cosines = [f @ r / np.linalg.norm(f) / np.linalg.norm(r) for f in forget for r in retain]
    expected = 7 * np.mean(np.square(cosines))
    assert mean_squared_cosine(forget, retain) == pytest.approx(expected, rel=1e-12)


def test_mean_squared_cosine_of_orthogonal_equal_and_random_sides():
    basis = orthonormal_rows(6, 6)
    assert mean_squared_cosine(basis[:2], basis[2:]) == pytest.approx(0, abs=1e-12)
    assert mean_squared_cosine(basis[:1], -3 * basis[:1]) == pytest.approx(6)
    assert mean_squared_cosine(gaussian(400, 16, 1), gaussian(400, 16, 2)) == pytest.approx(
        1, abs=0.02
    )
    assert math.isnan(mean_squared_cosine(basis[:0], basis))
    with pytest.raises(ValueError, match="equal d_in"):
        mean_squared_cosine(basis, np.ones((2, 5)))


@pytest.mark.parametrize(("k_forget", "k_retain"), [(3, 8), (8, 3), (1, 1), (10, 11)])
def test_random_overlap_is_about_the_larger_share_of_the_space(k_forget: int, k_retain: int):
    low, middle, high = random_overlap(k_forget, k_retain, 20, n_draws=400)
    rng = np.random.default_rng(5)
    naive = [
        subspace_overlap(
            rng.standard_normal((k_forget, 20)), rng.standard_normal((k_retain, 20))
        ).overlap
        for _ in range(400)
    ]
    assert low < np.mean(naive) < high
    expected = np.percentile(naive, (5, 50, 95))
    np.testing.assert_allclose((low, middle, high), expected, atol=0.03)
    assert np.mean(naive) == pytest.approx(max(k_forget, k_retain) / 20, abs=0.02)


def test_random_overlap_of_a_full_and_of_an_empty_side():
    assert random_overlap(3, 20, 20) == (1.0, 1.0, 1.0)
    assert all(math.isnan(value) for value in random_overlap(0, 4, 20))
    with pytest.raises(ValueError, match="0 <= k <= d_in"):
        random_overlap(3, 21, 20)
