"""The evaluation cache goes to disk and back without pickle, and scores as before."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from unlearning_bench import Bench, GetSAE

from raysae.store.cache import Entry
from raysae.store.entries import load_evaluation, save_evaluation
from raysae.unlearning import CachedEvaluator, EvaluationCache, default_eval_config


def test_a_cache_from_disk_scores_like_the_one_that_was_written(
    bench: Bench, sae_of: GetSAE, tmp_path: Path
):
    entry = Entry.at(tmp_path, "evaluation", {})
    save_evaluation(entry, bench.cache.to_plain())
    found = load_evaluation(entry)
    assert found is not None
    cache = EvaluationCache.from_plain(*found[1])
    for part, again in ((bench.cache, cache), (bench.cache.prompts, cache.prompts)):
        for name, value in vars(part).items():
            if isinstance(value, np.ndarray):
                np.testing.assert_array_equal(getattr(again, name), value)
            elif not hasattr(value, "resid"):
                assert getattr(again, name) == value
    assert cache.known_questions == bench.cache.known_questions
    sae = sae_of("topk", True)
    ours, theirs = (
        CachedEvaluator(bench.world, bench.model, c, bench.config).evaluate(sae, training_steps=1)
        for c in (cache, bench.cache)
    )
    assert (ours.score, ours.status) == (theirs.score, theirs.status)
    for name, right in theirs.is_correct.items():
        np.testing.assert_array_equal(ours.is_correct[name], right)


def test_a_cache_is_taken_whatever_the_world_and_its_model_are_called(bench: Bench):
    """It is found by contents, and names decide nothing of it."""
    world = replace(bench.world, name="another", saebench_model_name="renamed")
    config = default_eval_config(world)
    assert config.model_name == "renamed"
    evaluator = CachedEvaluator(world, bench.model, bench.cache, config)
    assert evaluator.known_questions == bench.cached().known_questions
    with pytest.raises(ValueError, match=r"the cache was built with .*'seq_len'"):
        CachedEvaluator(world, bench.model, bench.cache, replace(config, seq_len=8))
