"""Where the model itself misses known questions, no intervention is credited with that."""

from __future__ import annotations

import numpy as np
import pytest

from raysae.unlearning.grid import GridPoint
from raysae.unlearning.halves import Halves, halve, split_questions
from raysae.unlearning.result import UnlearningResult, make_result
from raysae.unlearning.scoring import unlearning_score
from raysae.worlds.world import FORGET_SET, RETAIN_SETS

COUNTS = {FORGET_SET: 40} | dict.fromkeys(RETAIN_SETS, 50)
NONE, SOME = (), (0, 3)


def asked(
    missed: int, rows: list[tuple[tuple[int, ...], int, int]], seed: int = 0
) -> UnlearningResult:
    """The model misses the first so many forget questions of either half by itself; under each
    intervention, of these features, so many of either half, and so many retain questions of a set.
    """
    chosen = split_questions(COUNTS, seed)[FORGET_SET]
    order = np.argsort(~chosen, kind="stable")  # of either half the first ones
    places = {True: order[:20], False: order[20:]}

    def forget(wrong: int) -> np.ndarray:
        right = np.ones(40, dtype=bool)
        for half in places.values():
            right[half[:wrong]] = False
        return right

    right = {FORGET_SET: np.stack([forget(wrong) for _, wrong, _ in rows])}
    right |= {name: np.ones((len(rows), 50), dtype=bool) for name in RETAIN_SETS}
    for row, (_, _, lost) in enumerate(rows):
        right[RETAIN_SETS[0]][row, :lost] = False
    baseline = {name: np.ones(n, dtype=bool) for name, n in COUNTS.items()}
    baseline[FORGET_SET] = forget(missed)
    return make_result(
        evaluator="cached",
        score=unlearning_score(right),
        grid=[GridPoint(0.01, 10, 25, features) for features, _, _ in rows],
        is_correct=right,
        baseline=baseline,
        forget_sparsity=np.linspace(0, 1, 8),
        retain_sparsity=np.zeros(8),
        eligible={0.001: 0, 0.01: 2},
    )


def credited(halves: Halves) -> tuple[float, float, float]:
    return halves.search.score, halves.heldout.score, halves.transferred.score


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize(
    ("rows", "status"),
    [
        ([(NONE, 1, 0), (NONE, 1, 0)], "no_eligible_features"),
        ([(NONE, 1, 0), (SOME, 20, 30)], "retain_gate_failed"),
        ([(SOME, 1, 0), (SOME, 1, 1)], "no_effect"),  # a clamp that changes nothing
        ([(SOME, 0, 0), (SOME, 1, 0)], "no_effect"),  # or mends something
    ],
)
def test_the_models_own_errors_are_no_forgetting(rows, status: str, seed: int):
    result = asked(1, rows, seed)
    assert result.score == pytest.approx(2 / 40), "SAEBench's number stays"
    assert (result.status, result.best) == (status, None)
    by_itself = "by itself the model gets 38 of 40 forget questions right"
    assert f"{by_itself}, which is all of the score of 0.0500" in result.cause
    assert result.frontier == 0
    halves = halve(result, seed)
    assert credited(halves) == (0.0, 0.0, 0.0)
    assert halves.search.status == halves.heldout.status == status
    assert "by itself the model gets 19 of 20 forget questions right" in halves.search.cause
    assert "which is all" not in halves.search.cause
    assert halves.transferred.status == "nothing_chosen"
    # As where the search half alone was asked, and the other half never.
    alone = result.on(split_questions(COUNTS, seed))
    assert (alone.score, alone.status, alone.best) == (0.0, status, None)


@pytest.mark.parametrize("seed", [0, 3])
def test_what_makes_forget_has_saebenchs_score_and_the_cause_names_the_models_errors(seed: int):
    result = asked(1, [(NONE, 1, 0), (SOME, 4, 0), (SOME, 3, 0)], seed)
    assert (result.score, result.status) == (pytest.approx(8 / 40), "ok")
    assert result.best == result.interventions[1]
    assert result.cause.endswith("; by itself the model gets 38 of 40 forget questions right")
    assert result.frontier == pytest.approx(6 / 40)
    halves = halve(result, seed)
    assert credited(halves) == pytest.approx((4 / 20,) * 3)
    assert "by itself the model gets 19 of 20 right" in halves.transferred.cause


def test_what_was_chosen_but_does_nothing_on_the_other_half_transfers_nothing():
    """It loses a question of the search half; of the other those that the model misses anyway."""
    result = asked(1, [(SOME, 1, 0)])
    lost = np.flatnonzero(split_questions(COUNTS, 0)[FORGET_SET])[-1]
    answers = {name: rows.copy() for name, rows in result.is_correct.items()}
    answers[FORGET_SET][0, lost] = False
    changed = make_result(
        evaluator="cached", score=unlearning_score(answers), grid=[GridPoint(0.01, 10, 25, SOME)],
        is_correct=answers, baseline=result.baseline, forget_sparsity=result.forget_sparsity,
        retain_sparsity=result.retain_sparsity, eligible=result.eligible_features,
    )  # fmt: skip
    halves = halve(changed, 0)
    assert credited(halves) == (pytest.approx(2 / 20), 0.0, 0.0)
    assert halves.transferred.status == "no_effect"


def test_without_errors_of_the_model_the_cause_does_not_speak_of_them():
    for result in (asked(0, [(SOME, 4, 0)]), asked(0, [(NONE, 0, 0)])):
        assert "by itself" not in result.cause
