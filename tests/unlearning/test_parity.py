"""The fast evaluator answers every question as SAEBench's own functions do."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import SAE
from tiny_models import gpt_neox, llama, with_random_model
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import PreTrainedConfig
from unlearning_bench import (
    Bench,
    assert_only_near_ties_differ,
    changed_answers,
    make_bench,
    sae_maker,
)

from raysae.unlearning import SAEBenchEvaluator, UnlearningResult, compiled
from raysae.unlearning.gemma_layers import GemmaLayersAfter
from raysae.unlearning.layers_after import LayersAfter
from raysae.worlds import World


def assert_equal(fast: UnlearningResult, slow: UnlearningResult) -> None:
    assert np.array_equal(fast.forget_sparsity, slow.forget_sparsity)
    assert np.array_equal(fast.retain_sparsity, slow.retain_sparsity)
    for name in slow.is_correct:
        assert np.array_equal(fast.is_correct[name], slow.is_correct[name]), name
    assert fast.score == slow.score
    assert fast.to_dict() | {"evaluator": ""} == slow.to_dict() | {"evaluator": ""}


def test_pieces_and_what_is_held_change_no_answer(bench: Bench, sae_of: Any) -> None:
    """As on a GPU: SAEBench's batches are encoded whole, and few positions are held at a time."""
    sae = sae_of("topk", True)
    other = bench.cached()
    other.encodes_pieces = other.pieces_alike = False
    other.positions_held = 256
    fast = bench.cached().evaluate(sae, training_steps=1)
    assert_equal(other.evaluate(sae, training_steps=1), fast)
    for piece_cost in (1000.0, 1e9):  # prompts of different lengths together
        other.piece_cost = piece_cost
        assert_equal(other.evaluate(sae, training_steps=1), fast)


@pytest.mark.skipif(compiled.library is None, reason="nothing was compiled at installation")
def test_without_what_is_compiled_every_answer_is_the_same(
    bench: Bench, sae_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    saes = [sae_of(architecture, True) for architecture in ("standard", "topk")]
    found = [bench.cached().evaluate(sae, training_steps=1) for sae in saes]
    monkeypatch.setattr(compiled, "library", None)
    by_pytorch = bench.cached()
    assert not by_pytorch.layers._last.is_compiled  # type: ignore[attr-defined]
    for sae, result in zip(saes, found, strict=True):
        assert_equal(by_pytorch.evaluate(sae, training_steps=1), result)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "random"])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "batchtopk"])
def test_every_answer_equals_saebench(
    bench: Bench, reference: SAEBenchEvaluator, sae_of: Any, architecture: str, trained: bool
) -> None:
    sae = sae_of(architecture, trained)
    fast = bench.cached().evaluate(sae, training_steps=300)
    slow = reference.evaluate(sae, training_steps=300)
    assert len(slow.interventions) == 16
    assert_equal(fast, slow)


def assert_parity(bench: Bench, sae: SAE[Any], **changes: Any) -> None:
    fast = bench.cached(**changes).evaluate(sae, training_steps=1)
    assert changed_answers(fast) > 0.02
    assert_equal(fast, bench.saebench(**changes).evaluate(sae, training_steps=1))


@pytest.mark.parametrize("layer", [1, 2])
def test_later_hooks(smaller_world: World, tmp_path: Path, layer: int) -> None:
    bench = make_bench(smaller_world, tmp_path, f"blocks.{layer}.hook_resid_post")
    assert_parity(bench, sae_maker(bench.corpus_rows(), steps=100)("topk", True))


@pytest.mark.parametrize(
    ("config", "layer"),
    [
        (gpt_neox(), 0),
        (gpt_neox(), 1),
        (gpt_neox(use_parallel_residual=False, tie_word_embeddings=True), 0),
        (llama(), 0),
        (llama(), 1),
        (llama(num_key_value_heads=4, tie_word_embeddings=True), 1),
    ],
    ids=["neox-0", "neox-1", "neox-sequential-0", "llama-grouped-0", "llama-grouped-1", "llama-1"],
)
def test_other_architectures(
    smaller_world: World, tmp_path: Path, config: PreTrainedConfig, layer: int
) -> None:
    """Random models: what they answer means nothing, and changes when features are clamped.

    Features that fire on up to a tenth of the retain tokens are clamped: many more answers change.
    """
    world = with_random_model(smaller_world, tmp_path / "model", config)
    bench = make_bench(world, tmp_path, f"blocks.{layer}.hook_resid_post")
    assert type(bench.cached().layers) is LayersAfter
    sae_of = sae_maker(bench.corpus_rows(), steps=100)
    for sae in (sae_of("standard", False), sae_of("topk", True)):
        assert_parity(bench, sae, retain_thresholds=[0.01, 0.1])


def test_in_bfloat16_only_near_ties_differ(smaller_world: World, tmp_path: Path) -> None:
    """The evaluators round at different places, and neither is nearer to float32 than the other.

    Features and sparsities are equal; an answer differs only where SAEBench's own two best letters
    are within what rounding moves them by, up to a dozen units of bfloat16.
    """
    bench = make_bench(smaller_world, tmp_path, dtype="bfloat16")
    sae = sae_maker(bench.corpus_rows(), steps=100)("topk", True)
    changes = {"multipliers": [50, 200]}
    fast = bench.cached(**changes).evaluate(sae, training_steps=1)
    assert changed_answers(fast) > 0.05
    # A unit is a 128th of the power of two: eight significant bits.
    assert_only_near_ties_differ(bench, sae, near=16 / 128, ties=0.15, differing=0.02, **changes)
    assert fast.score == bench.saebench(**changes).evaluate(sae, training_steps=1).score


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "batchtopk"])
def test_some_answers_change_so_that_parity_means_something(
    bench: Bench, sae_of: Any, architecture: str
) -> None:
    result = bench.cached().evaluate(sae_of(architecture, True), training_steps=1)
    assert changed_answers(result) > 0.02


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
        same, rows = torch.arange(6), torch.tensor([5, 0, 0, 3])
        past = layers.extend(resid[:, :4], [], same)
        past = layers.extend(resid[:, 4:7], past, same)
        letters = layers.letters(layers.answering(resid[rows, 7:], past, rows))
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
