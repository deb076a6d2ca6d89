"""The fast evaluator answers every question as SAEBench's own functions do."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig
from unlearning_bench import Bench

from raysae.unlearning import SAEBenchEvaluator, UnlearningResult
from raysae.unlearning.gemma_layers import GemmaLayersAfter
from raysae.unlearning.layers_after import LayersAfter, select


def assert_equal(fast: UnlearningResult, slow: UnlearningResult) -> None:
    assert np.array_equal(fast.forget_sparsity, slow.forget_sparsity)
    assert np.array_equal(fast.retain_sparsity, slow.retain_sparsity)
    for name in slow.is_correct:
        assert np.array_equal(fast.is_correct[name], slow.is_correct[name]), name
    assert fast.score == slow.score
    assert fast.to_dict() | {"evaluator": ""} == slow.to_dict() | {"evaluator": ""}


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "random"])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
def test_every_answer_equals_saebench(
    bench: Bench, reference: SAEBenchEvaluator, sae_of: Any, architecture: str, trained: bool
) -> None:
    sae = sae_of(architecture, trained)
    fast = bench.cached().evaluate(sae, training_steps=300)
    slow = reference.evaluate(sae, training_steps=300)
    assert len(slow.interventions) == 16
    assert_equal(fast, slow)


def test_some_answers_change_so_that_parity_means_something(bench: Bench, sae_of: Any) -> None:
    result = bench.cached().evaluate(sae_of("topk", True), training_steps=1)
    assert any((~right).any() for right in result.is_correct.values())


def test_fewer_eligible_features_than_requested(
    bench: Bench, reference: SAEBenchEvaluator, sae_of: Any
) -> None:
    """SAEBench's files of n=10 and n=20 are then one file; the score is the same."""
    sae = sae_of("standard", True)
    full = bench.cached().evaluate(sae, training_steps=1)
    keep = list(full.interventions[0].features[:3])
    silenced = torch.ones(len(sae.b_enc), dtype=torch.bool)
    silenced[keep] = False
    with torch.no_grad():
        sae.b_enc[silenced] = -1e6
    fast = bench.cached().evaluate(sae, training_steps=1)
    assert {i.n_features_used for i in fast.interventions} == {3}
    assert_equal(fast, reference.evaluate(sae, training_steps=1))


def test_read_only_unpickled_cache_gives_the_same(bench: Bench, sae_of: Any) -> None:
    cache = pickle.loads(pickle.dumps(bench.cache))
    for part in (cache.forget, cache.retain, cache.prompts):
        for field in dataclasses.fields(part):
            if isinstance(array := getattr(part, field.name), np.ndarray):
                array.flags.writeable = False
    sae = sae_of("topk", True)
    locked = dataclasses.replace(bench, cache=cache).cached().evaluate(sae, training_steps=1)
    assert_equal(locked, bench.cached().evaluate(sae, training_steps=1))


def test_the_generic_layers_answer_as_the_fused_ones(bench: Bench, sae_of: Any) -> None:
    fused, generic = bench.cached(), bench.cached()
    assert isinstance(fused.layers, GemmaLayersAfter)
    generic.layers = LayersAfter(bench.model, 0, bench.cache.answer_tokens)
    sae = sae_of("topk", True)
    assert_equal(generic.evaluate(sae, training_steps=1), fused.evaluate(sae, training_steps=1))


@pytest.mark.parametrize(
    "shape",
    [
        {"positional_embedding_type": "standard", "normalization_type": "LN"},
        {"positional_embedding_type": "rotary", "rotary_dim": 8, "parallel_attn_mlp": True},
        {"positional_embedding_type": "alibi", "normalization_type": None},
        {
            "positional_embedding_type": "rotary",
            "rotary_dim": 8,
            "n_key_value_heads": 2,
            "use_local_attn": True,
            "attn_types": ["global", "local", "local", "global"],
            "window_size": 3,
        },
    ],
    ids=["gpt2", "neox", "alibi", "grouped-local"],
)
def test_layers_in_pieces_equal_one_forward_pass(shape: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = {"n_layers": 4, "d_model": 32, "d_head": 8, "n_heads": 4, "n_ctx": 16, "d_vocab": 20}
    model = HookedTransformer(
        HookedTransformerConfig(**config, act_fn="gelu", d_mlp=64, seed=0, **shape)
    )
    tokens = torch.randint(20, (6, 12))
    answers = (3, 4, 5, 6, 7, 8, 9, 10)
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens)
        resid = cache["blocks.0.hook_resid_post"]
        layers = LayersAfter(model, 0, answers)
        past = layers.extend(resid[:, :4], [])
        past = layers.extend(resid[:, 4:7], past)
        rows = torch.tensor([5, 0, 0, 3])
        letters = layers.letters(resid[rows, 7:], select(past, rows))
    expected = logits[:, -1, answers].reshape(-1, 2, 4).amax(1).argmax(1)[rows]
    assert letters.tolist() == expected.tolist()


def test_a_custom_sae_of_saebench_is_scored(bench: Bench, sae_of: Any) -> None:
    from sae_bench.custom_saes.relu_sae import ReluSAE

    sae = sae_of("standard", True)
    custom = ReluSAE(
        sae.cfg.d_in, sae.cfg.d_sae, "gemma-2-2b-it", 0, torch.device("cpu"), torch.float32
    )
    custom.load_state_dict(sae.state_dict())
    mine = bench.cached().evaluate(custom, training_steps=1)
    assert mine.score == bench.cached().evaluate(sae, training_steps=1).score
