"""Each cause of a score of 0.0 is named, and SAEs that cannot be scored are refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from sae_lens import (
    StandardSAE,
    StandardSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
)
from unlearning_bench import Bench, silent_sae

from raysae.unlearning import SAEBenchEvaluator, UnlearningStatus, build_cache
from raysae.unlearning.cached import CachedEvaluator
from raysae.worlds.world import FORGET_SET


def test_untrained_is_refused_without_an_evaluation(
    bench: Bench, reference: SAEBenchEvaluator
) -> None:
    for evaluator in (bench.cached(), reference):
        result = evaluator.evaluate(None, training_steps=0)  # None: it is never looked at
        assert (result.score, result.status) == (0.0, UnlearningStatus.untrained)
        assert "0 steps" in result.cause and result.interventions == ()


@pytest.mark.parametrize("bias", [1e6, -1e6], ids=["dense", "dead"])
def test_no_eligible_features(bench: Bench, sae_of: Any, bias: float) -> None:
    sae = sae_of("standard", True)
    with torch.no_grad():
        sae.b_enc[:] = bias
    result = bench.cached().evaluate(sae, training_steps=1)
    assert (result.score, result.status) == (0.0, UnlearningStatus.no_eligible_features)
    assert result.eligible_features == {0.001: 0, 0.01: 0}
    assert result.best is None and len(result.interventions) == 16
    assert str(len(sae.b_enc)) in result.cause


def test_no_eligible_features_by_saebench_too(reference: SAEBenchEvaluator, sae_of: Any) -> None:
    sae = sae_of("standard", True)
    with torch.no_grad():
        sae.b_enc[:] = 1e6
    result = reference.evaluate(sae, training_steps=1)
    assert (result.score, result.status) == (0.0, UnlearningStatus.no_eligible_features)


def test_retain_gate_failed(bench: Bench, sae_of: Any) -> None:
    evaluator = bench.cached(retain_thresholds=[0.9], n_features_list=[20], multipliers=[9999])
    result = evaluator.evaluate(sae_of("topk", True), training_steps=1)
    assert (result.score, result.status) == (0.0, UnlearningStatus.retain_gate_failed)
    (only,) = result.interventions
    assert not only.passes_gate and f"{only.retain_correct} of 48" in result.cause


def test_no_effect(bench: Bench, sae_of: Any) -> None:
    sae = silent_sae(bench, sae_of("standard", True))
    result = bench.cached().evaluate(sae, training_steps=1)
    assert (result.score, result.status) == (0.0, UnlearningStatus.no_effect)
    assert result.eligible_features == {0.001: 1, 0.01: 1}
    assert result.best is None and "all 24 forget questions" in result.cause


def test_ok_names_the_best_intervention(bench: Bench, sae_of: Any) -> None:
    result = bench.cached().evaluate(sae_of("topk", True), training_steps=1)
    assert result.status is UnlearningStatus.ok, result.cause
    assert result.best is not None and result.best.passes_gate
    assert result.score == pytest.approx(1 - result.best.forget_accuracy)
    assert f"{result.best.forget_correct} of 24" in result.cause


def test_too_few_known_questions(bench: Bench) -> None:
    assert bench.world.known_questions is not None
    few = dataclasses.replace(
        bench.world, known_questions=dict(bench.world.known_questions) | {FORGET_SET: (0, 1, 2)}
    )
    with pytest.raises(ValueError, match=r"3 to forget and 48 to retain, at least 20"):
        build_cache(few, bench.model, bench.hook_name, bench.config)
    asked = CachedEvaluator(bench.world, bench.model, bench.cache, bench.config, min_known=25)
    result = asked.evaluate(None, training_steps=1)
    assert (result.score, result.status) == (0.0, UnlearningStatus.too_few_known_questions)
    slow = SAEBenchEvaluator(few, bench.model, bench.hook_name, bench.config, bench.work_dir)
    assert slow.evaluate(None, training_steps=1).status is result.status


def test_unit_norm_decoder_is_demanded(bench: Bench, sae_of: Any) -> None:
    sae = sae_of("standard", True)
    with torch.no_grad():
        sae.W_dec[3] *= 2
    with pytest.raises(ValueError, match=r"norms from .* to 2"):
        bench.cached().evaluate(sae, training_steps=1)


def test_raw_units_are_demanded(bench: Bench, sae_of: Any) -> None:
    sae = sae_of("standard", True)
    sae.cfg.normalize_activations = "layer_norm"
    with pytest.raises(ValueError, match="normalize_activations='layer_norm'"):
        bench.cached().evaluate(sae, training_steps=1)


def test_training_saes_are_refused(bench: Bench) -> None:
    sae = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=128, d_sae=16))
    with pytest.raises(ValueError, match="inference SAE"):
        bench.cached().evaluate(sae, training_steps=1)


def test_another_hook_is_refused(bench: Bench, sae_of: Any) -> None:
    sae = sae_of("standard", True)
    sae.cfg.metadata.hook_name = "blocks.2.hook_resid_post"
    with pytest.raises(ValueError, match=r"blocks\.2\.hook_resid_post"):
        bench.cached().evaluate(sae, training_steps=1)


def test_a_cache_of_another_configuration_is_refused(bench: Bench) -> None:
    other = dataclasses.replace(bench.config, dataset_size=7)
    with pytest.raises(ValueError, match="'dataset_size': 7"):
        CachedEvaluator(bench.world, bench.model, bench.cache, other)


def test_another_width_is_refused(bench: Bench, reference: SAEBenchEvaluator) -> None:
    sae = StandardSAE(StandardSAEConfig(d_in=64, d_sae=16))
    for evaluator in (bench.cached(), reference):
        with pytest.raises(ValueError, match=r"d_in 64, .* has 128 dimensions"):
            evaluator.evaluate(sae, training_steps=1)


def test_another_model_is_refused(bench: Bench, reference: SAEBenchEvaluator, sae_of: Any) -> None:
    sae = sae_of("standard", True)
    sae.cfg.metadata.model_name = "gpt2"
    for evaluator in (bench.cached(), reference):
        with pytest.raises(ValueError, match=r"model_name 'gpt2', .* 'gemma-2-2b-it'"):
            evaluator.evaluate(sae, training_steps=1)


def test_a_hook_the_model_lacks_is_refused(bench: Bench) -> None:
    missing, valid = "blocks.9.hook_resid_post", r"valid are 'blocks\.0\.hook_resid_post'"
    with pytest.raises(ValueError, match=valid):
        build_cache(bench.world, bench.model, missing, bench.config)
    with pytest.raises(ValueError, match=valid):
        SAEBenchEvaluator(bench.world, bench.model, missing, bench.config, bench.work_dir)
