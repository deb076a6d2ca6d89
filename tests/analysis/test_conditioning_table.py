"""The table of conditioning: its rows, columns and values."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.linalg
from sklearn.metrics import adjusted_rand_score

from raysae.analysis.conditioning import COLUMNS, TOLERANCES, conditioning_table
from raysae.analysis.spectra import (
    conditioning,
    random_baseline,
    spectrum,
)
from raysae.analysis.subspaces import (
    mean_squared_cosine,
    random_overlap,
    select_features,
    subspace_overlap,
)


def gaussian(n: int, d_in: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d_in))


def orthonormal_rows(n: int, d_in: int, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(gaussian(d_in, d_in, seed))[0][:n]


@pytest.fixture
def case() -> dict[str, np.ndarray]:
    p_forget = np.array([0.5] * 4 + [0.0] * 5 + [0.2] * 3 + [0.0] * 4)
    p_retain = np.array([0.0] * 4 + [0.5] * 5 + [0.2] * 3 + [0.0] * 4)
    return {"decoder": gaussian(16, 10), "forget_rate": p_forget, "retain_rate": p_retain}


def test_table_columns_and_rows(case):
    groups = np.array([0, 2] * 6 + [2, 2, 7, 7])
    table = conditioning_table(**case, groups=groups, trial="a", step=50, baseline_draws=3)
    assert list(table.columns) == list(COLUMNS)
    assert table["group"].tolist() == [
        "all", "forget", "retain", "shared", "group:0", "group:2", "group:7",
    ]  # fmt: skip
    # The four dead features count in "all" only; label 7 holds nothing else.
    assert table["n_features"].tolist() == [16, 4, 5, 3, 6, 6, 0]
    assert (table["trial"] == "a").all() and (table["step"] == 50).all()
    assert not table.duplicated(["trial", "step", "group"]).any()


def test_table_values_are_those_of_the_functions(case):
    table = conditioning_table(**case, trial=3, step=0, baseline_draws=4, baseline_seed=9)
    table = table.set_index("group")
    forget, retain, shared, _ = select_features(case["forget_rate"], case["retain_rate"])
    for group, mask in {"forget": forget, "retain": retain, "shared": shared}.items():
        expected = dataclasses.asdict(conditioning(case["decoder"][mask]))
        assert {name: table.loc[group, name] for name in expected} == expected
        baseline = random_baseline(int(mask.sum()), 10, 4, 9)
        for figure in ("condition_number", "effective_rank", "coherence"):
            names = [f"random_{figure}_p{percentile}" for percentile in (5, 50, 95)]
            assert tuple(table.loc[group, names]) == baseline[figure]
    pair = subspace_overlap(case["decoder"][forget], case["decoder"][retain])
    names = ["forget_retain_overlap", "forget_retain_chordal_distance", "smallest_principal_angle"]
    expected_pair = (pair.overlap, pair.chordal_distance, pair.principal_angles[0])
    assert tuple(table.loc["all", names]) == expected_pair
    assert table.loc[["forget", "retain", "shared"], names].isna().all(axis=None)


def test_table_ignores_the_order_of_features(case):
    groups = np.arange(16) % 3
    order = np.random.default_rng(5).permutation(16)
    first = conditioning_table(**case, groups=groups, trial=0, step=1, baseline_draws=2)
    permuted = {name: value[order] for name, value in case.items()}
    second = conditioning_table(**permuted, groups=groups[order], trial=0, step=1, baseline_draws=2)
    numeric = first.select_dtypes("number").columns
    np.testing.assert_allclose(first[numeric], second[numeric], rtol=1e-10)
    assert first["group"].tolist() == second["group"].tolist()


def test_table_without_selective_features_keeps_its_rows(case):
    rates = np.full(16, 0.1)
    table = conditioning_table(case["decoder"], rates, rates, trial=0, step=0, baseline_draws=2)
    assert table["group"].tolist() == ["all", "forget", "retain", "shared"]
    assert table["n_features"].tolist() == [16, 0, 0, 16]
    assert table["forget_retain_overlap"].isna().all()


def test_table_refuses_misfitting_input(case):
    with pytest.raises(ValueError, match="groups"):
        conditioning_table(**case, groups=np.zeros(15, dtype=int), trial=0, step=0)
    with pytest.raises(ValueError, match="groups"):
        conditioning_table(**case, groups=np.zeros(16), trial=0, step=0)
    with pytest.raises(ValueError, match="shape"):
        conditioning_table(case["decoder"][:15], case["forget_rate"], case["retain_rate"],
                           trial=0, step=0)  # fmt: skip


def rates_of(n_forget: int, n_retain: int) -> tuple[np.ndarray, np.ndarray]:
    """Firing rates that make the first features forget-selective and the rest retain-selective."""
    forget = np.r_[np.ones(n_forget), np.zeros(n_retain)]
    return forget, 1 - forget


@pytest.mark.parametrize("tolerance", TOLERANCES)
def test_ranks_at_other_tolerances_are_in_the_table(tolerance: float):
    """Nine singular values from 1 down to 1e-8: each cut-off keeps those above it."""
    values = 10.0 ** -np.arange(9)
    left, right = orthonormal_rows(9, 9, 1), orthonormal_rows(9, 9, 2)
    rows = left.T @ np.diag(values) @ right
    sigma = spectrum(rows)  # of the unit-normalised rows
    table = conditioning_table(rows, *rates_of(4, 5), trial=0, step=0, baseline_draws=1)
    row = table.set_index("group").loc["all"]
    kept = sigma[sigma > tolerance * sigma[0]]
    assert 0 < len(kept) < 9
    assert row[f"numerical_rank_at_{tolerance:g}"] == len(kept)
    assert row[f"condition_number_at_{tolerance:g}"] == pytest.approx(sigma[0] / kept[-1])


def test_an_empty_group_has_no_condition_number_at_any_tolerance():
    table = conditioning_table(gaussian(6, 4), *rates_of(6, 0), trial=0, step=0, baseline_draws=1)
    row = table.set_index("group").loc["retain"]
    for tolerance in TOLERANCES:
        assert row[f"numerical_rank_at_{tolerance:g}"] == 0
        assert math.isnan(row[f"condition_number_at_{tolerance:g}"])


def test_what_is_between_forget_and_retain_stands_on_the_all_row():
    rows = gaussian(9, 24)
    table = conditioning_table(rows, *rates_of(4, 5), trial=0, step=0).set_index("group")
    angles = scipy.linalg.subspace_angles(rows[:4].T, rows[4:].T)
    row = table.loc["all"]
    assert row["smallest_principal_angle"] == pytest.approx(angles.min())
    assert row["median_principal_angle"] == pytest.approx(np.median(angles))
    assert row["largest_principal_angle"] == pytest.approx(angles.max())
    assert (row["forget_dimension"], row["retain_dimension"]) == (4, 5)
    assert row["random_overlap_p50"] == random_overlap(4, 5, 24)[1]
    assert row["forget_retain_squared_cosine"] == mean_squared_cosine(rows[:4], rows[4:])
    assert table.loc["forget", "forget_dimension":"adjusted_rand_index"].isna().all()


def test_groups_are_compared_with_those_before_whatever_their_names():
    before = np.array([0, 0, 1, 1, 2, 2, 2, 2, 0])
    after = np.array([1, 1, 0, 0, 2, 2, 0, 2, 1])
    rates = rates_of(4, 5)

    def index(groups: np.ndarray | None, previous: np.ndarray | None) -> float:
        table = conditioning_table(
            gaussian(9, 5), *rates, groups, previous, trial=0, step=0, baseline_draws=1
        )
        return float(table["adjusted_rand_index"].iloc[0])

    assert index(after, before) == adjusted_rand_score(before, after) < 1
    assert index((before + 1) % 3, before) == 1
    assert math.isnan(index(after, None))
    assert math.isnan(index(None, before))
