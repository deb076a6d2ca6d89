"""Several SAEs in one pass, and a part of the questions, give what each alone and all give."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from unlearning_bench import Bench, GetSAE, silent_sae

from raysae.unlearning import (
    Halves,
    SAEBenchEvaluator,
    UnlearningResult,
    halve,
    split_questions,
)


def assert_same(a: UnlearningResult, b: UnlearningResult) -> None:
    assert a.to_dict() == b.to_dict()
    assert np.array_equal(a.forget_sparsity, b.forget_sparsity)
    assert np.array_equal(a.retain_sparsity, b.retain_sparsity)
    for name in b.is_correct:
        assert np.array_equal(a.is_correct[name], b.is_correct[name]), name
        assert np.array_equal(a.baseline[name], b.baseline[name]), name


@pytest.fixture(scope="module")
def saes(sae_of: GetSAE) -> list[Any]:
    return [sae_of("topk", True), sae_of("standard", True), sae_of("topk", False)]


@pytest.fixture(scope="module")
def alone(bench: Bench, saes: list[Any]) -> list[UnlearningResult]:
    return [bench.cached().evaluate(sae, training_steps=1) for sae in saes]


@pytest.mark.parametrize("at_once", [2, 4])
def test_several_saes_are_scored_as_each_alone(
    bench: Bench, saes: list[Any], alone: list[UnlearningResult], at_once: int
) -> None:
    evaluator = bench.cached()
    evaluator.saes_at_once = at_once
    together = evaluator.evaluate_many(saes, training_steps=1)
    for ours, theirs in zip(together, alone, strict=True):
        assert_same(ours, theirs)
    turned = [{n: v.tobytes() for n, v in r.is_correct.items()} for r in together]
    assert turned[0] != turned[1], "SAEs that answer alike would hide a mix-up"


def test_one_without_eligible_features_among_others(
    bench: Bench, sae_of: GetSAE, alone: list[UnlearningResult]
) -> None:
    dead = sae_of("standard", True)
    dead.b_enc.data[:] = -1e6
    first, second = bench.cached().evaluate_many([dead, sae_of("topk", True)], training_steps=1)
    assert first.status == "no_eligible_features"
    assert_same(second, alone[0])


@pytest.mark.parametrize("seed", [0, 5])
def test_a_part_of_the_questions_is_that_part_of_all(
    bench: Bench, saes: list[Any], alone: list[UnlearningResult], seed: int
) -> None:
    half = split_questions(bench.cache.known_questions, seed)
    found = bench.cached().evaluate_many(saes, training_steps=1, questions=half)
    for ours, whole in zip(found, alone, strict=True):
        assert_same(ours, whole.on(half))
        assert_same(ours, halve(whole, seed).search)
        assert ours.baseline_forget_total < whole.baseline_forget_total
        assert (ours.partial, whole.partial) == (True, False)
        assert halve(ours, seed) == Halves(ours, None, None)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "random"])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "batchtopk"])
def test_of_every_architecture_the_search_half_is_that_of_the_whole(
    bench: Bench, sae_of: GetSAE, architecture: str, trained: bool
) -> None:
    """Features that fire on up to a tenth of the retain tokens: hundreds of answers change."""
    evaluator = bench.cached(retain_thresholds=[0.01, 0.1])
    sae = sae_of(architecture, trained)
    whole = evaluator.evaluate(sae, training_steps=1)
    part = {name: rows != whole.baseline[name] for name, rows in whole.is_correct.items()}
    assert sum(int(turned.sum()) for turned in part.values()) > 50
    half = split_questions(evaluator.known_questions, 0)
    ours = evaluator.evaluate(sae, training_steps=1, questions=half)
    assert_same(ours, halve(whole, 0).search)


@pytest.mark.parametrize(
    "status", ["ok", "no_eligible_features", "retain_gate_failed", "no_effect"]
)
def test_the_search_half_has_the_status_of_the_whole(
    bench: Bench, sae_of: GetSAE, status: str
) -> None:
    sae, changes = sae_of("topk", True), {}
    if status == "no_eligible_features":
        sae = sae_of("standard", True)
        sae.b_enc.data[:] = 1e6
    elif status == "retain_gate_failed":
        changes = {"retain_thresholds": [0.9], "multipliers": [9999]}
    elif status == "no_effect":
        sae = silent_sae(bench, sae_of("standard", True))
    evaluator = bench.cached(**changes)
    half = split_questions(evaluator.known_questions, 0)
    ours = evaluator.evaluate(sae, training_steps=1, questions=half)
    assert ours.status == status, ours.cause
    assert_same(ours, halve(evaluator.evaluate(sae, training_steps=1), 0).search)


def test_what_is_refused_is_refused_on_a_part_too(bench: Bench) -> None:
    half = split_questions(bench.cache.known_questions, 0)
    untrained = bench.cached().evaluate(None, training_steps=0, questions=half)
    assert (untrained.status, untrained.score) == ("untrained", 0.0)


def test_saebenchs_loop_answers_for_a_part_what_the_fast_one_does(
    bench: Bench, reference: SAEBenchEvaluator, saes: list[Any]
) -> None:
    half = split_questions(reference.known_questions, 0)
    assert reference.known_questions == bench.cached().known_questions
    (slow,) = reference.evaluate_many(saes[:1], training_steps=1, questions=half)
    fast = bench.cached().evaluate(saes[0], training_steps=1, questions=half)
    assert slow.partial and slow.score == fast.score > 0
    assert slow.to_dict() | {"evaluator": ""} == fast.to_dict() | {"evaluator": ""}
    for name in half:
        assert np.array_equal(slow.is_correct[name], fast.is_correct[name]), name
    short = half | {"wmdp-bio": np.ones(5, bool)}
    with pytest.raises(ValueError, match="questions must be masks of shapes"):
        reference.evaluate(saes[0], training_steps=1, questions=short)


def test_what_is_not_asked_is_not_run(
    bench: Bench, saes: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = bench.cached()
    letters, answered = evaluator.layers.letters, []

    def count(resid: Any, *of_rows: Any) -> Any:
        answered.append(len(resid))
        return letters(resid, *of_rows)

    monkeypatch.setattr(evaluator.layers, "letters", count)
    evaluator.evaluate(saes[0], training_steps=1)
    all_of_them = sum(answered)
    answered.clear()
    half = split_questions(bench.cache.known_questions, 5)
    evaluator.evaluate(saes[0], training_steps=1, questions=half)
    assert 0 < sum(answered) < 0.7 * all_of_them


def test_masks_of_other_questions_are_refused(bench: Bench, saes: list[Any]) -> None:
    masks = {n: np.ones(count, bool) for n, count in bench.cache.known_questions.items()}
    short = masks | {"wmdp-bio": np.ones(5, bool)}
    with pytest.raises(ValueError, match=r"'wmdp-bio': \(24,\).*not.*'wmdp-bio': \(5,\)"):
        bench.cached().evaluate(saes[0], training_steps=1, questions=short)
    empty = masks | {"human_aging": np.zeros(12, bool)}
    with pytest.raises(ValueError, match="at least one of each data set"):
        bench.cached().evaluate(saes[0], training_steps=1, questions=empty)
