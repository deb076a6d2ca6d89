"""Session-wide: the small world, its model and cache, and SAEs trained on it once."""

from __future__ import annotations

import pytest
from torch import Tensor
from unlearning_bench import Bench, GetSAE, cut, make_bench, sae_maker

from raysae.unlearning import SAEBenchEvaluator
from raysae.unlearning.result import MIN_KNOWN_QUESTIONS
from raysae.worlds import World, load_world


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    world = cut(load_world("embedded"), n_forget=24, n_retain=12, n_texts=300)
    return make_bench(world, tmp_path_factory.mktemp("saebench"))


@pytest.fixture(scope="session")
def smaller_world() -> World:
    """As few questions as are evaluated at all, for tests that build a cache of their own."""
    return cut(load_world("embedded"), n_forget=MIN_KNOWN_QUESTIONS, n_retain=5, n_texts=120)


@pytest.fixture(scope="session")
def reference(bench: Bench) -> SAEBenchEvaluator:
    return bench.saebench()


@pytest.fixture(scope="session")
def corpus_rows(bench: Bench) -> Tensor:
    """(tokens, d_model) of both corpora at the hook."""
    return bench.corpus_rows()


@pytest.fixture(scope="session")
def sae_of(corpus_rows: Tensor) -> GetSAE:
    """(architecture, trained) → SAE; weights are trained once per kind."""
    return sae_maker(corpus_rows)
