"""SAEBench runs on a world's data and leaves nothing behind."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from sae_bench.evals.unlearning.eval_output import UnlearningEvalOutput
from sae_bench.evals.unlearning.utils import feature_activation, metrics
from unlearning_bench import Bench, cut

from raysae.unlearning import (
    SAEBenchEvaluator,
    best_row,
    build_cache,
    default_eval_config,
    sae_cfg_dict,
    unlearning_score,
)
from raysae.unlearning.known import known_question_ids


def state() -> tuple[Any, ...]:
    return (
        random.getstate(),
        np.random.get_state()[1].tolist(),  # type: ignore[index]
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
        metrics.load_dataset,
        metrics.tqdm,
        feature_activation.get_forget_retain_data,
    )


@pytest.mark.parametrize("grad", [True, False])
def test_nothing_is_left_behind(
    bench: Bench,
    reference: SAEBenchEvaluator,
    sae_of: Any,
    grad: bool,
    capfd: pytest.CaptureFixture[str],
) -> None:
    sae = sae_of("topk", False)
    capfd.readouterr()
    with torch.set_grad_enabled(grad):
        before = state()
        build_cache(bench.world, bench.model, bench.hook_name, bench.config)
        bench.cached().evaluate(sae, training_steps=1)
        if grad:
            reference.evaluate(sae, training_steps=1)
        assert state() == before
    assert not list(bench.work_dir.glob("saebench-*/sae-*"))
    assert bench.model.cfg.model_name == bench.world.saebench_model_name
    assert capfd.readouterr() == ("", "")


def test_the_sae_is_left_as_it_was(bench: Bench, sae_of: Any) -> None:
    sae = sae_of("topk", True)
    config, weights = sae.cfg.to_dict(), {n: w.clone() for n, w in sae.state_dict().items()}
    bench.cached().evaluate(sae, training_steps=1)
    assert sae.cfg.to_dict() == config and not hasattr(sae.cfg, "hook_layer")
    assert all(torch.equal(weights[name], w) for name, w in sae.state_dict().items())


def test_defaults_are_saebenchs_own(bench: Bench) -> None:
    config = default_eval_config(bench.world)
    assert config.retain_thresholds == [0.001, 0.01]
    assert config.n_features_list == [10, 20]
    assert config.multipliers == [25, 50, 100, 200]
    assert (config.dataset_size, config.random_seed) == (1024, 42)
    assert config.seq_len == bench.world.seq_len


def test_ids_found_by_saebench_are_the_worlds(bench: Bench) -> None:
    small = cut(bench.world, n_forget=6, n_retain=2, n_texts=10)
    unknown = dataclasses.replace(small, known_questions=None)
    found = known_question_ids(unknown, bench.model, bench.config)
    assert small.known_questions is not None
    assert {n: tuple(ids) for n, ids in found.items()} == dict(small.known_questions)


def test_output_is_saebenchs_own_object(bench: Bench, sae_of: Any) -> None:
    sae = sae_of("topk", True)
    result = bench.cached().evaluate(sae, training_steps=1)
    output = result.to_saebench_output(
        bench.config, sae_cfg_dict(sae, bench.world, bench.hook_name), sae_release="mine"
    )
    read = TypeAdapter(UnlearningEvalOutput).validate_json(output.to_json())
    assert read.eval_result_metrics.unlearning.unlearning_score == result.score
    assert read.eval_config == bench.config and read.sae_lens_release_id == "mine"
    assert read.sae_cfg_dict is not None
    assert read.sae_cfg_dict["metadata"]["hook_name"] == bench.hook_name
    assert read.eval_result_unstructured["status"] == result.status.value


def test_score_of_a_subset_of_questions(bench: Bench, sae_of: Any) -> None:
    result = bench.cached().evaluate(sae_of("topk", True), training_steps=1)
    assert unlearning_score(result.is_correct) == result.score
    assert best_row(result.is_correct) == result.interventions.index(result.best)
    half = {name: rows[:, ::2] for name, rows in result.is_correct.items()}
    assert 0.0 <= unlearning_score(half) <= 1.0
