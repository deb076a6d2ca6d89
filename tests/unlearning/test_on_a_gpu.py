"""On a GPU the fast evaluator answers as SAEBench does there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import gemma_2, gpt_neox, llama, with_random_model
from transformers import PreTrainedConfig
from unlearning_bench import assert_only_near_ties_differ, make_bench, sae_maker

from raysae.worlds import World

DEVICES = [
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
    "cpu",
]
"""The same on a CPU, so that a test that fails on a GPU says something about the GPU."""

NEAR = {"float32": (2**-17, 0.002, 0.001), "bfloat16": (2**-2, 0.5, 0.05)}
"""By type: what counts as a near tie, the share of them, and that of answers that differ."""


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "config", [gpt_neox(), gemma_2(), llama()], ids=["neox", "gemma-2", "llama"]
)
def test_every_answer_equals_saebench_or_is_a_near_tie(
    smaller_world: World, tmp_path: Path, config: PreTrainedConfig, dtype: str, device: str
) -> None:
    world = with_random_model(smaller_world, tmp_path / "model", config)
    bench = make_bench(world, tmp_path, "blocks.0.hook_resid_post", dtype, device)
    near, ties, differing = NEAR[dtype]
    limits = {"near": near, "ties": ties, "differing": differing}
    sae = sae_maker(bench.corpus_rows(), steps=100)("topk", True)
    changes = {"retain_thresholds": [0.01, 0.1], "multipliers": [50, 200]}
    assert_only_near_ties_differ(bench, sae, **limits, **changes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "batchtopk"])
def test_every_answer_of_the_embedded_world(
    smaller_world: World, tmp_path: Path, architecture: str
) -> None:
    bench = make_bench(smaller_world, tmp_path, device="cuda")
    sae = sae_maker(bench.corpus_rows(), steps=300)(architecture, True)
    near, ties, differing = NEAR["float32"]
    assert_only_near_ties_differ(bench, sae, near=near, ties=ties, differing=differing)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_a_cpu_cached_is_scored_on_a_gpu(smaller_world: World, tmp_path: Path) -> None:
    """The store may be filled elsewhere. A feature that barely fires may do so on one of them."""
    on_cpu, on_gpu = (make_bench(smaller_world, tmp_path, device=d) for d in ("cpu", "cuda"))
    sae = sae_maker(on_cpu.corpus_rows(), steps=100)("standard", True)
    on_gpu.cache = on_cpu.cache
    ours, theirs = (b.cached().evaluate(sae, training_steps=1) for b in (on_gpu, on_cpu))
    assert abs(ours.forget_sparsity - theirs.forget_sparsity).max() < 1e-3
    for name, right in theirs.is_correct.items():
        assert (ours.is_correct[name] != right).mean() < 0.05
