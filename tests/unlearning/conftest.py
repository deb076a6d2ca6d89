"""Session-wide: the small world, its model and cache, and SAEs trained on it once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sae_lens import SAE
from torch import Tensor
from unlearning_bench import Bench, cut, make_sae, random_weights, train

from raysae.unlearning import SAEBenchEvaluator, build_cache, default_eval_config
from raysae.worlds import load_world
from raysae.worlds.model import load_model


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    world = cut(load_world("embedded"), n_forget=24, n_retain=12, n_texts=300)
    model = load_model(world)
    config = default_eval_config(world)
    cache = build_cache(world, model, world.default_hook_name, config)
    return Bench(world, model, config, cache, tmp_path_factory.mktemp("saebench"))


@pytest.fixture(scope="session")
def reference(bench: Bench) -> SAEBenchEvaluator:
    return bench.saebench()


@pytest.fixture(scope="session")
def corpus_rows(bench: Bench) -> Tensor:
    """(tokens, d_model) of both corpora at the hook."""
    corpora = (bench.cache.forget, bench.cache.retain)
    return torch.cat([torch.from_numpy(c.resid[c.counts]) for c in corpora])


@pytest.fixture(scope="session")
def sae_of(corpus_rows: Tensor) -> Callable[[str, bool], SAE[Any]]:
    """(architecture, trained) → SAE; weights are trained once per kind."""
    weights: dict[tuple[bool, bool], dict[str, Tensor]] = {}

    def get(architecture: str, trained: bool) -> SAE[Any]:
        key = (architecture == "topk", trained)
        if key not in weights:
            topk = 4 if key[0] else None
            with torch.enable_grad():
                weights[key] = (
                    train(corpus_rows, topk=topk) if trained else random_weights(corpus_rows)
                )
        return make_sae(architecture, weights[key])

    return get
