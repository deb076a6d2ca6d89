"""The confirmation: who is trained again, beside what, and with which seeds."""

from __future__ import annotations

from math import ceil

import pytest
from ended import Record, config, of_run, record, runs

from raysae.search.confirm import begun_with, confirmation_trials
from raysae.training.spec import TrialSpec


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
