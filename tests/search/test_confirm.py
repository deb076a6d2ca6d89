"""The confirmation: who is trained again, beside what, with which seeds, and what it proves."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raysae.analysis.confirmation import COLUMNS, verdicts
from raysae.analysis.describe import by_transferred, disagreement
from raysae.analysis.statistics import bootstrap_interval, p_of_mean
from raysae.config import RunConfig
from raysae.search.confirm import begun_with, confirmation_trials
from raysae.training.spec import TrialSpec

Record = dict[str, Any]


def config(top: int = 2, seeds: int = 3, seed: int = 0) -> RunConfig:
    return RunConfig(
        sae={"k": 4},
        space={"regularizer": {"none": None}},
        search={"seed": seed},
        confirm={"top": top, "seeds": seeds},
    )


def record(
    spec: TrialSpec,
    score: float,
    state: str = "finished",
    heldout: list[float] | None = None,
    transferred: list[float] | None = None,
) -> Record:
    """The journal's `end` record of a trial; of one of several seeds with their held-out scores,
    and their transferred ones where the version that wrote it had them."""
    rung: Record = {} if state == "failed" else {"score": score, "heldout_score": score}
    if heldout is not None:
        rung["seeds"] = [{"score": score, "heldout_score": value} for value in heldout]
    for seed, value in zip(rung.get("seeds", ()), transferred or (), strict=False):
        seed["transferred_score"] = value
    return {"trial": spec.number, "state": state, "spec": spec.to_dict(), "rung": rung, "error": ""}


def runs(specs: list[TrialSpec]) -> list[str]:
    return list(dict.fromkeys(spec.run for spec in specs))


def of_run(specs: list[TrialSpec], start: str) -> list[TrialSpec]:
    return [spec for spec in specs if spec.run.startswith(start)]


@pytest.fixture
def grouped(make_spec) -> Callable[..., TrialSpec]:
    """A trial with the method `grouped`; keywords as for `make_spec`."""

    def make(number: int, **kwargs: Any) -> TrialSpec:
        parameters = {"group_update_period": 7, "n_groups": 3}
        return make_spec(regularizer="grouped", parameters=parameters, number=number, **kwargs)

    return make


# --- Who is trained again -------------------------------------------------------------------------


def test_the_best_trials_that_were_trained_to_the_end_are_trained_again(grouped):
    states = ["finished", "stopped", "failed", "finished", "finished"]
    scores = [0.3, 0.9, 0.0, 0.4, 0.5]
    ended = [record(grouped(i), scores[i], states[i]) for i in range(5)]
    assert [r for r in runs(confirmation_trials(config(), ended)) if "trial" in r] == [
        "trial 4",
        "trial 3",
    ]
    again = of_run(confirmation_trials(config(), ended), "trial 4")
    assert {spec.regularizer for spec in again} == {grouped(4).regularizer}
    assert {spec.alpha for spec in again} == {1.0}


def test_of_equal_scores_the_one_with_the_better_frontier_is_trained_again(grouped):
    """Where all are 0 the first would always be the one without a regularizer."""
    ended = [record(grouped(i), 0.0) for i in range(4)]
    for r, frontier in zip(ended, [0.01, 0.03, 0.04, 0.02], strict=True):
        r["rung"]["halves"] = {"search": {"frontier": frontier}}
    assert [r for r in runs(confirmation_trials(config(), ended)) if "trial" in r] == [
        "trial 2",
        "trial 1",
    ]


@pytest.mark.parametrize("top", [1, 3, 9])
def test_as_many_are_trained_again_as_asked_for_and_there_are(top: int, grouped):
    ended = [record(grouped(i), i / 10) for i in range(4)]
    specs = confirmation_trials(config(top=top), ended)
    assert len(runs(of_run(specs, "trial "))) == min(top, 4)


def test_nothing_is_trained_again_where_nothing_ended_well_or_none_is_asked_for(grouped):
    assert confirmation_trials(config(), []) == []
    ended = [record(grouped(0), 0.3, "stopped"), record(grouped(1), 0.0, "failed")]
    assert confirmation_trials(config(), ended) == []
    assert confirmation_trials(config(top=0), [record(grouped(0), 0.3)]) == []


def test_numbers_go_on_after_the_searchs(grouped):
    ended = [record(grouped(number), 0.1) for number in (0, 1, 6)]
    numbers = [spec.number for spec in confirmation_trials(config(), ended)]
    assert numbers == list(range(7, 7 + len(numbers)))


@pytest.mark.parametrize("seed", [0, 3])
def test_seeds_are_fresh_and_shared_by_candidates_and_baselines(seed: int, grouped):
    search = config(seeds=4, seed=seed)
    ended = [record(grouped(i, seed=search.seed_of(i)), i / 10) for i in range(3)]
    specs = confirmation_trials(search, ended)
    assert len(specs) == len(runs(specs)) == 4
    (shared,) = {tuple(member.seed for member in spec.members()) for spec in specs}
    assert len(set(shared)) == 4
    assert not set(shared) & {search.seed_of(number) for number in range(20_000)}


@pytest.mark.parametrize(
    ("each", "sizes"), [(1, [1] * 8), (3, [3, 3, 2]), (4, [4, 4]), (8, [8]), (9, [8]), (None, [8])]
)
def test_a_configuration_has_the_same_seeds_in_however_many_trials(
    each: int | None, sizes: list[int], grouped
):
    search = config(seeds=8)
    ended = [record(grouped(i, sparsity=4 + i), i / 10) for i in range(3)]
    together, split = (confirmation_trials(search, ended, n) for n in (None, each))
    assert [spec.number for spec in split] == list(range(3, 3 + len(split)))
    assert runs(split) == runs(together) and len(together) == 6
    for whole in together:
        parts = [spec for spec in split if spec.run == whole.run]
        assert [spec.seeds for spec in parts] == sizes
        again = [member for spec in parts for member in spec.members()]
        alike = {"number": whole.number}  # decides no numbers
        assert [member.model_copy(update=alike) for member in again] == whole.members()


@pytest.mark.parametrize(("at_a_time", "each"), [(1, 8), (2, 4), (3, 3), (5, 2), (8, 1), (20, 1)])
def test_as_many_trials_are_made_of_a_configuration_as_are_trained_at_a_time(
    at_a_time: int, each: int, grouped
):
    search = config(top=1, seeds=8)
    assert search.confirm.seeds_per_trial(at_a_time) == each
    specs = confirmation_trials(search, [record(grouped(0), 0.3)], each)
    assert len(specs) == search.max_confirmation(at_a_time) == 3 * ceil(8 / each)
    assert {spec.seeds for spec in specs[:: ceil(8 / each)]} == {each}


def test_a_confirmation_is_gone_on_with_in_the_trials_that_it_was_begun_with(grouped):
    search = config(top=1, seeds=8)
    ended = [record(grouped(0), 0.3)]

    def submitted(spec: TrialSpec) -> Record:
        return {"event": "submit", "trial": spec.number, "spec": spec.to_dict(), "session": "a"}

    journal = [submitted(grouped(0).model_copy(update={"seeds": 20})), ended[0] | {"event": "end"}]
    assert begun_with(journal) is None
    for each in (8, 4, 3):
        for spec in confirmation_trials(search, ended, each)[:2]:
            assert begun_with([*journal, submitted(spec)]) == each


def test_another_search_is_confirmed_with_other_seeds(grouped):
    ended = [record(grouped(0), 0.1)]
    first, second = (
        {m.seed for spec in confirmation_trials(config(seed=seed), ended) for m in spec.members()}
        for seed in (0, 1)
    )
    assert not first & second


# --- Beside what ----------------------------------------------------------------------------------


def test_baselines_have_the_candidates_sae_and_training(grouped):
    candidate = grouped(0, sparsity=6, d_sae=48, lr=0.02, rungs=(512, 1536))
    specs = confirmation_trials(config(), [record(candidate, 0.4)])
    assert {spec.regularizer.name for spec in specs} == {"grouped", "none", "fixed_orthogonal"}
    assert len(specs) == 3
    for spec in specs:
        assert spec.seeds == 3
        assert (spec.sae, spec.training) == (candidate.sae, candidate.training)
        assert spec.rungs == (1536,)
        assert spec.stage == "confirmation"
        assert TrialSpec(**spec.to_dict()) == spec


def test_candidates_of_equal_budget_share_their_baselines(grouped):
    ended = [record(grouped(i, alpha=i + 1.0), 0.4) for i in range(2)]
    specs = confirmation_trials(config(), ended)
    assert len({spec.run for spec in specs}) == len(specs) == 4


@pytest.mark.parametrize(
    "change",
    [{"sparsity": 5}, {"d_sae": 48}, {"lr": 0.02}, {"steps": 30}, {"batch_size": 32}],
    ids=lambda change: next(iter(change)),
)
def test_candidates_of_unequal_budget_have_baselines_of_their_own(change: dict, grouped):
    candidates = [grouped(0), grouped(1, **change)]
    specs = confirmation_trials(config(), [record(spec, 0.4) for spec in candidates])
    assert len(specs) == 6
    for method in ("none", "fixed_orthogonal"):
        baselines = [spec for spec in specs if spec.regularizer.name == method]
        budgets = [(spec.sae, spec.training) for spec in baselines]
        assert {budgets.count((c.sae, c.training)) for c in candidates} == {1}


@pytest.mark.parametrize("method", ["none", "fixed_orthogonal"])
def test_a_method_is_not_its_own_baseline(method: str, make_spec):
    specs = confirmation_trials(config(), [record(make_spec(regularizer=method), 0.4)])
    (other,) = {"none", "fixed_orthogonal"} - {method}
    assert sorted(spec.regularizer.name for spec in specs) == sorted([method, other])


def test_the_fixed_orthogonal_baseline_has_the_alpha_that_did_best_in_the_search(
    make_spec, grouped
):
    def fixed(number: int, alpha: float, schedule: str = "constant") -> TrialSpec:
        return make_spec("topk", "fixed_orthogonal", number=number, alpha=alpha, schedule=schedule)

    ended = [
        record(grouped(0), 0.9),
        record(fixed(1, 0.1), 0.3),
        record(fixed(2, 0.5, "cosine"), 0.4),
        record(fixed(3, 7.0), 0.6, "stopped"),
        record(fixed(4, 30.0), 0.0, "failed"),
    ]

    def baseline(ended: list[Record]) -> tuple[float, str]:
        specs = of_run(confirmation_trials(config(top=1), ended), "fixed_orthogonal")
        ((alpha, schedule),) = {(spec.alpha, spec.alpha_schedule.name) for spec in specs}
        return alpha, schedule

    assert baseline(ended) == (0.5, "cosine")
    assert baseline([ended[0], ended[3], ended[4]]) == (7.0, "constant")
    assert baseline([ended[0], ended[4]]) == (1.0, "constant")
    assert baseline(ended[:1]) == (1.0, "constant")


# --- What follows ---------------------------------------------------------------------------------


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
    assert len(names) == 9
    assert none[names].isna().all() and not none.drop(names).isna().any()
    assert none["difference"] == pytest.approx(0.7 / 3)
    assert fixed["transferred_difference"] == pytest.approx(0.3)
    assert by_transferred(none.to_dict()) == disagreement(none.to_dict()) == ""


@pytest.mark.parametrize(
    ("heldout", "transferred", "caution"),
    [
        ([0.3] * 3, [0.3] * 3, ""),
        ([0.3] * 3, [0.5, 0.2, 0.4], "by the transferred score it is not shown to beat it"),
        ([0.3] * 3, [0.6] * 3, "by the transferred score it is worse than it"),
        ([0.5, 0.2, 0.6], [0.3] * 3, "by the transferred score it beats it"),
        ([0.5, 0.2, 0.6], [0.5, 0.1, 0.6], ""),
        ([0.6] * 3, [0.6] * 3, ""),
        ([0.6] * 3, [0.5, 0.1, 0.6], "by the transferred score it is not shown to beat it"),
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
        ([0.4, 0.4, 0.4], True, True, False),
        ([0.40, 0.41, 0.42], True, True, False),  # t = 15.6
        ([0.2, 0.4, 0.45], True, False, False),  # t = 2: by chance once in five times
        ([0.4, 0.4, 0.5], False, False, False),
        ([0.6, 0.6, 0.6], False, False, True),
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
