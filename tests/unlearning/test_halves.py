"""The two halves of the questions, and what an evaluation says on a part of them."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from sae_bench.evals.unlearning.main import get_unlearning_scores
from scipy.stats import norm

from raysae.unlearning import UnlearningResult, UnlearningStatus, halve, split_questions
from raysae.unlearning.grid import GridPoint
from raysae.unlearning.halves import TransferStatus
from raysae.unlearning.result import make_result, refused, wilson_interval
from raysae.unlearning.scoring import unlearning_score
from raysae.worlds.world import FORGET_SET, RETAIN_SETS

COUNTS = {FORGET_SET: 20} | dict.fromkeys(RETAIN_SETS, 50)  # halves of 10 and 4 · 25
Right = tuple[int, int]
"""Right answers of an intervention: of the questions to forget, of those to retain."""


def result_of(
    is_correct: dict[str, np.ndarray], features: tuple[int, ...] = (0, 3)
) -> UnlearningResult:
    """The result of these answers; every question is known without an intervention."""
    n = len(is_correct[FORGET_SET])
    return make_result(
        evaluator="cached",
        score=unlearning_score(is_correct),
        grid=[GridPoint(0.01, 10, 10 * (row + 1), features) for row in range(n)],
        is_correct=is_correct,
        baseline={name: np.ones(rows.shape[1], bool) for name, rows in is_correct.items()},
        forget_sparsity=np.linspace(0, 1, 8),
        retain_sparsity=np.zeros(8),
        eligible={0.001: 2, 0.01: 4},
    )


def answers(counts: dict[str, int], rows: list[Right]) -> dict[str, np.ndarray]:
    """By data set, (rows, questions): so many right in all, the first ones of the first sets."""
    found = {name: np.zeros((len(rows), n), dtype=bool) for name, n in counts.items()}
    for row, (forget, retain) in enumerate(rows):
        found[FORGET_SET][row, :forget] = True
        for name in RETAIN_SETS:
            found[name][row, :retain] = True
            retain -= min(retain, counts[name])
    return found


def by_halves(search: list[Right], heldout: list[Right], seed: int) -> UnlearningResult:
    """A result with so many right answers on either half of `COUNTS`, by intervention."""
    chosen = split_questions(COUNTS, seed)
    n_search = {name: int(mask.sum()) for name, mask in chosen.items()}
    n_heldout = {name: int((~mask).sum()) for name, mask in chosen.items()}
    assert n_search == n_heldout
    whole = {name: np.zeros((len(search), n), dtype=bool) for name, n in COUNTS.items()}
    for name, mask in chosen.items():
        whole[name][:, mask] = answers(n_search, search)[name]
        whole[name][:, ~mask] = answers(n_heldout, heldout)[name]
    return result_of(whole)


# --- The split ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, 7, 20, 101])
def test_the_search_sees_the_larger_half(count: int):
    (mask,) = split_questions({"set": count}, 0).values()
    assert mask.shape == (count,)
    assert mask.sum() in (count // 2, (count + 1) // 2)
    assert mask.sum() >= (~mask).sum()


def test_a_split_follows_from_seed_name_and_size_alone():
    counts = {"first": 30, "second": 30}
    chosen = split_questions(counts, 4)
    again = split_questions({"third": 5} | counts, 4)
    for name in counts:
        assert np.array_equal(chosen[name], again[name])
    assert not np.array_equal(chosen["first"], chosen["second"])
    assert not np.array_equal(chosen["first"], split_questions(counts, 5)["first"])


def test_every_question_is_as_likely_in_either_half():
    masks = [split_questions({"set": 11}, seed)["set"] for seed in range(600)]
    share = np.mean(masks, axis=0)
    # 6 of 11; the standard error of a share is 0.02
    assert np.abs(share - 6 / 11).max() < 0.08


@pytest.mark.parametrize("seed", [0, 1])
def test_every_question_is_in_one_half(seed: int):
    """Each question is answered right by an intervention of its own: the halves share none."""
    counts = {FORGET_SET: 9} | dict.fromkeys(RETAIN_SETS, 3)
    whole = {name: np.zeros((9, n), dtype=bool) for name, n in counts.items()}
    whole[FORGET_SET] = np.eye(9, dtype=bool)
    halves = halve(result_of(whole), seed)
    on_search = [i.forget_correct for i in halves.search.interventions]
    on_heldout = [i.forget_correct for i in halves.heldout.interventions]
    assert [a + b for a, b in zip(on_search, on_heldout, strict=True)] == [1] * 9
    assert (sum(on_search), sum(on_heldout)) == (5, 4)
    totals = [(r.interventions[0].forget_total, r.interventions[0].retain_total)
              for r in (halves.search, halves.heldout)]  # fmt: skip
    assert totals == [(5, 8), (4, 4)]


# --- What the halves say --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 7])
def test_scores_and_counts_of_the_halves_are_those_of_the_answers(seed: int):
    search = [(6, 100), (2, 98), (8, 99)]  # the second costs too much here …
    heldout = [(9, 98), (3, 100), (5, 99)]  # … and the first there
    result = by_halves(search, heldout, seed)
    halves = halve(result, seed)

    assert halves.search.score == pytest.approx(0.4)
    assert halves.heldout.score == pytest.approx(0.7)
    assert result.score == pytest.approx(1 - 5 / 20)  # 198 of 200 are 99 %
    for half, expected in ((halves.search, search), (halves.heldout, heldout)):
        assert half.status is UnlearningStatus.ok
        assert [(i.forget_correct, i.retain_correct) for i in half.interventions] == expected
        assert {(i.forget_total, i.retain_total) for i in half.interventions} == {(10, 100)}
    assert halves.search.best == halves.search.interventions[0]
    assert halves.heldout.best == halves.heldout.interventions[1]
    assert halves.transferred.intervention == halves.heldout.interventions[0]


def test_the_halves_as_plain_data():
    found = halve(by_halves([(6, 100), (10, 100)], [(9, 98), (4, 100)], 3), 3).to_dict()
    assert found["search"]["score"] == pytest.approx(0.4)
    assert found["heldout"]["score"] == pytest.approx(0.6)
    assert found["search"]["best"]["multiplier"] == 10
    assert found["heldout"]["best"]["multiplier"] == 20
    transferred = found["transferred"]
    assert (transferred["score"], transferred["status"]) == (0.0, "retain_gate_failed")
    counts = {"forget_correct": 9, "forget_total": 10, "retain_correct": 98, "retain_total": 100}
    assert {name: transferred[name] for name in counts} == counts
    assert transferred["multiplier"] == 10
    # Wilson's, solved for the accuracies whose standard error puts 9 of 10 at 1.96 of them.
    z = norm.ppf(0.975)
    for edge in transferred["forget_interval"]:
        assert abs(0.9 - edge) == pytest.approx(z * (edge * (1 - edge) / 10) ** 0.5, rel=1e-6)


@pytest.mark.parametrize(
    ("search", "heldout", "statuses", "scores"),
    [
        ([(5, 98)], [(5, 99)], ("retain_gate_failed", "ok"), (0.0, 0.5)),
        ([(10, 100)], [(0, 100)], ("no_effect", "ok"), (0.0, 1.0)),
        ([(5, 99)], [(10, 99)], ("ok", "no_effect"), (0.5, 0.0)),
        ([(1, 99)], [(1, 0)], ("ok", "retain_gate_failed"), (0.9, 0.0)),
    ],
)
def test_each_half_has_a_status_of_its_own(search, heldout, statuses, scores):
    halves = halve(by_halves(search, heldout, 0), 0)
    assert (halves.search.status, halves.heldout.status) == statuses
    assert (halves.search.score, halves.heldout.score) == pytest.approx(scores)
    chosen = halves.transferred.status is not TransferStatus.nothing_chosen
    assert chosen == (halves.transferred.intervention is not None) == (scores[0] > 0)


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize(
    ("search", "heldout", "row", "score", "status"),
    [
        # The first wins on the search half; the second would be the better on the other.
        ([(4, 99), (5, 100)], [(6, 99), (3, 100)], 0, 0.4, "ok"),
        # The winner passes there by a question, and fails here by one.
        ([(5, 100), (2, 99)], [(1, 100), (1, 98)], 1, 0.0, "retain_gate_failed"),
        ([(5, 100), (2, 99)], [(1, 100), (1, 99)], 1, 0.9, "ok"),
        # It passes on both and loses nothing here.
        ([(9, 100), (10, 100)], [(10, 100), (3, 100)], 0, 0.0, "no_effect"),
        # Of equal ones the first.
        ([(4, 100), (4, 100)], [(8, 100), (2, 100)], 0, 0.2, "ok"),
        # Nothing wins: each fails the gate, or changes nothing.
        ([(0, 98), (1, 97)], [(0, 100), (1, 100)], None, 0.0, "nothing_chosen"),
        ([(10, 100), (10, 100)], [(0, 100), (1, 100)], None, 0.0, "nothing_chosen"),
    ],
)
def test_the_transferred_score_is_that_of_the_search_halfs_winner_on_the_held_out_half(
    search, heldout, row: int | None, score: float, status: str, seed: int
):
    halves = halve(by_halves(search, heldout, seed), seed)
    found = halves.transferred
    assert (found.score, found.status) == (pytest.approx(score), status)
    assert found.score <= halves.heldout.score
    if row is None:
        assert found.intervention is None
        assert halves.search.cause in found.cause
        assert set(found.to_dict()) == {"score", "status", "cause"}
        return
    assert found.intervention == halves.heldout.interventions[row]
    forget, retain = heldout[row]
    assert f"{forget} of 10 held-out forget questions" in found.cause
    assert f"{retain} of 100 to retain" in found.cause
    assert ("fewer than 99%" in found.cause) == (status == "retain_gate_failed")


def test_a_winner_on_both_halves_transfers_the_held_out_score_to_its_last_digit():
    """Not one that differs by rounding, which would count as a difference between the two."""
    for forget in range(10):
        halves = halve(by_halves([(3, 100)], [(forget, 99)], 0), 0)
        assert halves.transferred.score == halves.heldout.score


@pytest.mark.parametrize("seed", range(5))
def test_saebenchs_own_rule_gives_the_score_of_either_half(seed: int):
    rng = np.random.default_rng(seed)
    n_rows = 12
    spoilt = {FORGET_SET: 0.5} | dict.fromkeys(RETAIN_SETS, 0.01)
    whole = {name: rng.random((n_rows, n)) >= spoilt[name] for name, n in COUNTS.items()}
    halves = halve(result_of(whole), seed)
    chosen = split_questions(COUNTS, seed)
    for half, sign in ((halves.search, True), (halves.heldout, False)):
        kept = {name: rows[:, chosen[name] == sign] for name, rows in whole.items()}
        retain = np.concatenate([kept[name] for name in RETAIN_SETS], axis=1)
        table = pd.DataFrame(
            {
                FORGET_SET: kept[FORGET_SET].mean(axis=1),
                "all_side_effects_mcq": retain.mean(axis=1),
            }
        )
        assert half.score == pytest.approx(get_unlearning_scores(table), abs=1e-6)
        assert half.score > 0


def test_a_result_that_was_refused_is_the_same_on_both_halves():
    result = refused("cached", UnlearningStatus.untrained, "0 steps")
    halves = halve(result, 0)
    assert halves.search is halves.heldout is result
    assert (halves.transferred.score, halves.transferred.status) == (0.0, "nothing_chosen")
    assert "0 steps" in halves.transferred.cause
    found = halves.to_dict()
    assert found["search"] == found["heldout"]
    assert (found["search"]["status"], found["search"]["frontier"]) == ("untrained", 0.0)


def test_of_the_search_half_alone_nothing_is_transferred():
    result = by_halves([(5, 100)], [(5, 100)], 2)
    halves = halve(result.on(split_questions(COUNTS, 2)), 2)
    assert halves.search.score == pytest.approx(0.5)
    assert halves.transferred is None
    assert halves.to_dict()["transferred"] is None


# --- A result on a part of its questions ----------------------------------------------------------


def test_on_all_questions_a_result_is_itself():
    result = result_of(answers(COUNTS, [(12, 199), (4, 100), (18, 200)]))
    same = result.on({name: np.ones(n, dtype=bool) for name, n in COUNTS.items()})
    assert same.to_dict() == result.to_dict()
    assert (same.interventions, same.best) == (result.interventions, result.best)
    for name in COUNTS:
        assert np.array_equal(same.is_correct[name], result.is_correct[name])
        assert np.array_equal(same.baseline[name], result.baseline[name])
    assert np.array_equal(same.forget_sparsity, result.forget_sparsity)
    assert np.array_equal(same.retain_sparsity, result.retain_sparsity)


def test_on_a_part_only_its_questions_count():
    whole = answers(COUNTS, [(12, 150)])
    part = {name: np.zeros(n, dtype=bool) for name, n in COUNTS.items()}
    part[FORGET_SET][10:] = True  # two of these ten are right
    for name in RETAIN_SETS[:3]:
        part[name][:] = True  # and all of these
    found = result_of(whole).on(part)
    (only,) = found.interventions
    assert (only.forget_correct, only.forget_total) == (2, 10)
    assert (only.retain_correct, only.retain_total) == (150, 150)
    assert (found.score, found.status) == (pytest.approx(0.8), UnlearningStatus.ok)
    assert (found.baseline_forget_total, found.baseline_retain_correct) == (10, 150)


# --- The frontier ---------------------------------------------------------------------------------


def integral(rows: list[Right], n_forget: int, n_retain: int) -> float:
    """Mean over r from 0.9 to 1 of the largest loss at retain accuracy r or more, exactly."""
    points = [(Fraction(r, n_retain), 1 - Fraction(f, n_forget)) for f, r in rows]
    lowest = Fraction(9, 10)
    edges = sorted({lowest, Fraction(1), *(kept for kept, _ in points if kept > lowest)})
    area = Fraction(0)
    for low, high in pairwise(edges):
        area += (high - low) * max((loss for kept, loss in points if kept >= high), default=0)
    return float(area / (1 - lowest))


@pytest.mark.parametrize(
    "rows",
    [
        [(10, 200)],
        [(0, 189), (10, 195), (15, 199), (20, 200)],
        [(0, 170), (5, 179)],  # below 0.9: worth nothing
        [(3, 191), (3, 183), (19, 200)],
        [(0, 200), (0, 180)],
    ],
)
def test_the_frontier_is_the_area_under_the_best_losses(rows: list[Right]):
    result = result_of(answers(COUNTS, rows))
    assert result.frontier == pytest.approx(integral(rows, 20, 200), abs=0.01)  # of 101 levels
    assert 0 <= result.frontier <= 1


def test_the_frontier_of_one_intervention_is_its_loss_up_to_its_retain_accuracy():
    counts = COUNTS | dict.fromkeys(RETAIN_SETS, 100)
    # 0.9525: 53 of the 101 levels 0.900, 0.901, … 1 are kept
    assert result_of(answers(counts, [(5, 381)])).frontier == pytest.approx(0.75 * 53 / 101)


def test_the_frontier_of_interventions_without_effect_is_0_and_of_perfect_ones_1():
    assert result_of(answers(COUNTS, [(20, 200), (20, 190)])).frontier == 0
    assert result_of(answers(COUNTS, [(20, 200), (0, 200)])).frontier == 1


def test_the_frontier_tells_near_misses_of_the_gate_from_far_ones():
    near, far = (result_of(answers(COUNTS, [(5, kept)])) for kept in (197, 185))
    assert near.score == far.score == 0
    assert near.status is far.status is UnlearningStatus.retain_gate_failed
    assert near.frontier > far.frontier > 0


# --- Intervals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "n"), [(0, 20), (20, 20), (7, 20), (1, 1), (50, 100), (396, 400)])
def test_the_interval_of_an_accuracy_is_wilsons(k: int, n: int):
    z = norm.ppf(0.975)
    p = k / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half_width = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = wilson_interval(k, n)
    assert (low, high) == pytest.approx((centre - half_width, centre + half_width), abs=1e-9)
