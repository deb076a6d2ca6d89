"""What a confirmation proves: candidates against baselines, seed by seed."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ended import Record, config, of_run, record, runs
from scipy.stats import binomtest
from statsmodels.stats.multitest import multipletests

from raysae.analysis.confirmation import COLUMNS, verdicts
from raysae.analysis.describe import by_transferred, disagreement
from raysae.analysis.statistics import bootstrap_interval, holm, p_of_mean
from raysae.search.confirm import confirmation_trials


def confirmed(
    ended: list[Record],
    scores: dict[str, list[float]],
    top: int = 2,
    transferred: dict[str, list[float]] | None = None,
) -> list[Record]:
    """`ended`, and its confirmation's records with held-out and transferred scores by start of the
    run's name."""
    specs = confirmation_trials(config(top=top), ended)
    found = list(ended)
    for start, values in scores.items():
        (mine,) = of_run(specs, start)
        others = (transferred or {}).get(start)
        found.append(record(mine, 0.99, heldout=values, transferred=others))
    assert len(found) == len(ended) + len(specs)
    return found


def test_a_verdict_compares_seed_by_seed_on_the_held_out_half(grouped):
    scores = {
        "trial 0": [0.5, 0.6, 0.4],
        "none": [0.2, 0.3, 0.3],
        "fixed_orthogonal": [0.5, 0.4, 0.6],
    }
    table = verdicts(confirmed([record(grouped(0), 0.7)], scores))
    assert list(table.columns) == list(COLUMNS)
    none, fixed = table.to_dict("records")
    for row, baseline, mean, difference, low, high, wins in (
        (none, "none", 0.8 / 3, 0.7 / 3, 0.1, 0.3, 3),
        (fixed, "fixed_orthogonal", 0.5, 0.0, -0.2, 0.2, 1),
    ):
        assert (row["candidate"], row["baseline"], row["seeds"]) == (0, baseline, 3)
        assert row["candidate_heldout"] == pytest.approx(0.5)
        assert row["baseline_heldout"] == pytest.approx(mean)
        assert row["difference"] == pytest.approx(difference)
        # of three differences an interval of 95 % reaches from the smallest to the largest:
        # one in 27 resamples, 3.7 %, holds either three times
        assert (row["low"], row["high"]) == pytest.approx((low, high))
        assert row["wins"] == wins
    # t = mean / (s / √3) of the differences 0.3, 0.3, 0.1, at two degrees of freedom
    t = (0.7 / 3) / (np.std([0.3, 0.3, 0.1], ddof=1) / 3**0.5)
    assert none["p"] == pytest.approx(1 - t / (t * t + 2) ** 0.5)
    assert fixed["p"] == pytest.approx(1)
    assert (none["beats"], fixed["beats"]) == (False, False)


def test_transferred_scores_have_a_verdict_of_their_own_by_the_same_statistics(grouped):
    scores = {
        "trial 0": [0.5, 0.6, 0.4],
        "none": [0.2, 0.3, 0.3],
        "fixed_orthogonal": [0.5, 0.4, 0.6],
    }
    others = {"trial 0": [0.3, 0.0, 0.2], "none": [0.5, 0.4, 0.6], "fixed_orthogonal": [0.1] * 3}
    ended = [record(grouped(0), 0.7)]
    table = verdicts(confirmed(ended, scores, transferred=others))
    swapped = verdicts(confirmed(ended, others, transferred=scores))
    before = verdicts(confirmed(ended, scores))
    statistics = ("difference", "low", "high", "p", "wins", "beats", "worse")
    kinds = [name for name in COLUMNS if "transferred" not in name]
    assert table[kinds].equals(before[kinds]), "the held-out score's verdict is as without"
    for name in statistics:
        assert table[f"transferred_{name}"].tolist() == swapped[name].tolist()
        assert table[name].tolist() == swapped[f"transferred_{name}"].tolist()
    none = table.iloc[0]
    assert none["candidate_transferred"] == pytest.approx(0.5 / 3)
    assert none["baseline_transferred"] == pytest.approx(0.5)
    assert none["transferred_difference"] == pytest.approx(-1 / 3)
    assert (none["transferred_low"], none["transferred_high"]) == pytest.approx((-0.4, -0.2))
    assert (none["transferred_wins"], none["transferred_beats"]) == (0, False)


@pytest.mark.parametrize("known", [0, 2])
def test_where_a_seed_has_no_transferred_score_there_is_none_of_the_configuration(
    known: int, grouped
):
    """Of an older version, or of a search that was gone on with by this one."""
    scores = {"trial 0": [0.5, 0.6, 0.4], "none": [0.2, 0.3, 0.3], "fixed_orthogonal": [0.5] * 3}
    others = {"trial 0": [0.4] * 3, "none": [0.1] * known, "fixed_orthogonal": [0.1] * 3}
    none, fixed = (
        row for _, row in verdicts(confirmed([record(grouped(0), 0.7)], scores,
                                             transferred=others)).iterrows()
    )  # fmt: skip
    names = [name for name in COLUMNS if "transferred" in name]
    assert len(names) == 10
    assert none[names].isna().all() and not none.drop(names).isna().any()
    assert none["difference"] == pytest.approx(0.7 / 3)
    assert fixed["transferred_difference"] == pytest.approx(0.3)
    assert by_transferred(none.to_dict()) == disagreement(none.to_dict()) == ""


LOW, HIGH = [0.30, 0.31, 0.29], [0.60, 0.61, 0.59]
"""Baselines that a candidate of 0.4 beats, or that beat it: t = 17 and 35."""


@pytest.mark.parametrize(
    ("heldout", "transferred", "caution"),
    [
        (LOW, LOW, ""),
        (LOW, [0.5, 0.2, 0.4], "by the transferred score it is not shown to beat it"),
        (LOW, HIGH, "by the transferred score it is worse than it"),
        ([0.5, 0.2, 0.6], LOW, "by the transferred score it beats it"),
        ([0.5, 0.2, 0.6], [0.5, 0.1, 0.6], ""),
        (HIGH, HIGH, ""),
        (HIGH, [0.5, 0.1, 0.6], "by the transferred score it is not shown to be worse"),
    ],
)
def test_verdicts_that_do_not_agree_are_cautioned_against(
    heldout, transferred, caution: str, grouped, tmp_path: Path
):
    """From the table, and from the file that `status` reads without pandas."""
    mine = [0.4] * 3
    scores = {"trial 0": mine, "none": heldout, "fixed_orthogonal": heldout}
    others = {"trial 0": mine, "none": transferred, "fixed_orthogonal": transferred}
    table = verdicts(confirmed([record(grouped(0), 0.7)], scores, transferred=others))
    table.to_csv(tmp_path / "confirmation.csv", index=False)
    with (tmp_path / "confirmation.csv").open(newline="") as file:
        written = next(csv.DictReader(file))
    mean = sum(transferred) / 3
    for row in (table.iloc[0].to_dict(), written):
        assert disagreement(row) == caution
        words = by_transferred(row)
        assert words.startswith(
            f"Caution, {caution}: " if caution else "By the transferred score: "
        )
        assert f"0.400 against {mean:.3f}, difference {0.4 - mean:+.3f} [" in words


def test_verdicts_do_not_depend_on_how_the_seeds_were_split(grouped):
    search, ended = config(seeds=5), [record(grouped(0), 0.7)]
    rng = np.random.default_rng(0)
    by_seed = {run: rng.random((2, 5)) for run in runs(confirmation_trials(search, ended))}

    def table(each: int, lost: int | None = None) -> Any:
        found, first = list(ended), dict.fromkeys(by_seed, 0)
        for spec in confirmation_trials(search, ended, each):
            part = slice(first[spec.run], first[spec.run] + spec.seeds)
            heldout, transferred = by_seed[spec.run][:, part]
            first[spec.run] += spec.seeds
            one = record(spec, 0.9, heldout=list(heldout), transferred=list(transferred))
            if spec.number == lost:
                one |= {"state": "failed", "rung": {}}
            found.append(one)
        return verdicts(found)

    whole = table(5)
    assert whole["seeds"].tolist() == [5, 5]
    for each in (1, 2, 3):
        assert table(each).equals(whole)
    # Of a trial that failed the seeds are missing, and no others.
    assert table(2, lost=2)["seeds"].tolist() == [3, 3]


@pytest.mark.parametrize(
    ("baseline", "above", "beats", "worse"),
    [
        ([0.4, 0.4, 0.4], True, False, False),  # one sign, as chance has it in a quarter
        ([0.40, 0.41, 0.42], True, True, False),  # t = 15.6
        ([0.36, 0.40, 0.42], True, False, False),  # t = 6.1: p 0.026, and two comparisons
        ([0.2, 0.4, 0.45], True, False, False),  # t = 2: by chance once in five times
        ([0.4, 0.4, 0.5], False, False, False),
        ([0.60, 0.61, 0.62], False, False, True),
        ([0.8, 0.6, 0.55], False, False, False),
    ],
)
def test_one_beats_another_where_chance_would_seldom_have_it_so(
    baseline, above: bool, beats: bool, worse: bool, grouped
):
    scores = {"trial 0": [0.5] * 3, "none": baseline, "fixed_orthogonal": baseline}
    table = verdicts(confirmed([record(grouped(0), 0.7)], scores))
    assert (table["low"] > 0).tolist() == [above, above]
    assert table["beats"].tolist() == [beats, beats]
    assert table["worse"].tolist() == [worse, worse]


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_without_a_difference_one_beats_another_once_in_forty(seeds: int):
    rng = np.random.default_rng(0)
    draws = [rng.normal(size=seeds) for _ in range(4000)]
    found = np.mean([p_of_mean(x) < 0.05 and x.mean() > 0 for x in draws])
    assert found == pytest.approx(0.025, abs=0.0075)  # three standard errors


def test_a_single_difference_shows_nothing():
    assert p_of_mean(np.array([0.3])) == 1.0
    assert p_of_mean(np.zeros(3)) == 1.0
    assert np.isnan(bootstrap_interval(np.array([0.3]))).all()


@pytest.mark.parametrize("seeds", [2, 3, 6])
def test_equal_differences_are_as_likely_as_equal_signs(seeds: int):
    expected = binomtest(seeds, seeds).pvalue
    for difference in (0.1, -0.2):
        assert p_of_mean(np.full(seeds, difference)) == pytest.approx(expected)
    rounded = np.nextafter(0.1, [0.0, *[1.0] * (seeds - 1)])
    assert p_of_mean(rounded) == pytest.approx(expected)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_scores_of_ten_questions_beat_others_by_chance_once_in_forty(seeds: int):
    """A lattice so coarse that differences are often equal."""
    rng = np.random.default_rng(1)
    draws = rng.binomial(10, 0.3, size=(4000, 2, seeds)) / 10
    differences = draws[:, 0] - draws[:, 1]
    found = np.mean([p_of_mean(x) < 0.05 and x.mean() > 0 for x in differences])
    assert found < 0.033  # three standard errors above 0.025


@pytest.mark.parametrize("seed", range(3))
def test_the_correction_is_that_of_statsmodels(seed: int):
    p = np.random.default_rng(seed).random(7) ** 3
    p[3] = p[5]
    np.testing.assert_allclose(holm(p), multipletests(p, method="holm")[1])
    gaps = np.array([np.nan, *p, np.nan])
    np.testing.assert_allclose(holm(gaps)[1:-1], holm(p))
    assert np.isnan(holm(gaps)[[0, -1]]).all()
    assert len(holm(np.zeros(0))) == 0


@pytest.mark.parametrize(("top", "seeds"), [(2, 3), (5, 5)])
def test_of_tables_without_a_difference_few_have_a_winner(top: int, seeds: int, grouped):
    """Several candidates beside two baselines, which they share: as the README says, one or more
    are said to be better in at most 2.5 % of such tables, not in 2.5 % of their rows."""
    ended = [record(grouped(number), 0.9 - 0.1 * number) for number in range(top)]
    specs = confirmation_trials(config(top=top, seeds=seeds), ended, seeds)
    found = [record(spec, 0.9, heldout=[0.0] * seeds) for spec in specs]
    rng = np.random.default_rng(0)
    tables = 300
    with_winner = with_any = 0
    for _ in range(tables):
        for one in found:
            for seed in one["rung"]["seeds"]:
                seed["heldout_score"] = rng.normal(0.3, 0.05)
        table = verdicts(found)
        assert len(table) == 2 * top
        assert (table["p_holm"] >= table["p"]).all()
        with_winner += table["beats"].any()
        with_any += (table["beats"] | table["worse"]).any()
    assert with_winner / tables < 0.025 + 2.5 * (0.025 / tables) ** 0.5
    assert with_any / tables < 0.05 + 2.5 * (0.05 / tables) ** 0.5


def test_a_baseline_that_could_not_be_trained_gives_no_verdict(grouped):
    scores = {"trial 0": [0.5, 0.9, 0.7], "none": [0.1, 0.2, 0.3], "fixed_orthogonal": [0.0] * 3}
    ended = confirmed([record(grouped(0), 0.7)], scores)
    (lost,) = (r for r in ended if r["spec"]["run"].startswith("none"))
    lost |= {"state": "failed", "rung": {}}
    assert verdicts(ended)["baseline"].tolist() == ["fixed_orthogonal"]


def test_without_a_confirmation_there_is_no_verdict(grouped):
    for ended in ([], [record(grouped(0), 0.4), record(grouped(1), 0.0, "failed")]):
        table = verdicts(ended)
        assert table.empty
        assert list(table.columns) == list(COLUMNS)


def test_every_candidate_is_compared_with_the_baselines_of_its_own_budget(grouped):
    ended = [record(grouped(0), 0.8), record(grouped(1, sparsity=6), 0.7)]
    scores = {
        "trial 0": [0.5] * 3,
        "trial 1": [0.5] * 3,
        "none beside topk k=4": [0.4] * 3,
        "none beside topk k=6": [0.3] * 3,
        "fixed_orthogonal beside topk k=4": [0.2] * 3,
        "fixed_orthogonal beside topk k=6": [0.1] * 3,
    }
    table = verdicts(confirmed(ended, scores)).set_index(["candidate", "baseline"])
    expected = {
        (0, "none"): 0.4,
        (0, "fixed_orthogonal"): 0.2,
        (1, "none"): 0.3,
        (1, "fixed_orthogonal"): 0.1,
    }
    assert table["baseline_heldout"].to_dict() == pytest.approx(expected)


def test_a_candidate_is_not_compared_with_its_own_method_beside_another(make_spec, grouped):
    ended = [record(grouped(0), 0.8), record(make_spec(number=1), 0.7)]  # equal budgets
    scores = {
        "trial 0": [0.5] * 3,
        "trial 1": [0.4] * 3,
        "none": [0.4] * 3,
        "fixed_orthogonal": [0.2] * 3,
    }
    table = verdicts(confirmed(ended, scores))
    assert list(zip(table["candidate"], table["baseline"], strict=True)) == [
        (0, "none"),
        (0, "fixed_orthogonal"),
        (1, "fixed_orthogonal"),
    ]


# --- The interval ---------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [[0.1, 0.3, 0.2], [-0.5, 0.5, 0.0], [0.2, 0.2, 0.2], [0, 0, 1]])
def test_the_interval_of_three_values_is_that_of_all_resamples(values: list[float]):
    means = [np.mean(resample) for resample in itertools.product(values, repeat=3)]
    exact = np.quantile(means, [0.025, 0.975], method="inverted_cdf")
    assert bootstrap_interval(np.array(values)) == pytest.approx(tuple(exact))


def test_the_interval_of_five_values_is_near_that_of_all_resamples():
    values = np.array([0.1, 0.35, 0.2, -0.05, 0.6])
    means = [np.mean(resample) for resample in itertools.product(values, repeat=5)]
    exact = np.quantile(means, [0.025, 0.975])
    found = bootstrap_interval(values)
    assert found == pytest.approx(tuple(exact), abs=0.02)
    assert values.min() < found[0] < values.mean() < found[1] < values.max()
    assert bootstrap_interval(values) == found


@pytest.mark.parametrize(("seeds", "chance"), [(3, 0.125), (5, 0.066), (20, 0.03)])
def test_how_often_chance_alone_is_ahead(seeds: int, chance: float):
    """As the README says: the interval of few seeds is no test at 2.5 %."""
    rng = np.random.default_rng(0)
    ahead = [bootstrap_interval(rng.normal(size=seeds))[0] > 0 for _ in range(1000)]
    assert np.mean(ahead) == pytest.approx(chance, abs=0.025)
