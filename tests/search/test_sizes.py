"""Sizes from texts alone, and the object store that is made for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.torch import load_file

from raysae.config import RunConfig, load_config
from raysae.errors import UserError
from raysae.search import sizes
from raysae.search.room import model_bytes
from raysae.search.run import resolve
from raysae.search.sizes import (
    EVALUATION_SEQUENCES,
    LEAST_STORE,
    CorpusSize,
    choose_store_memory,
    corpus_size,
    largest_corpus_size,
    store_size,
)
from raysae.store.tiers import MEMORY_SHARE
from raysae.unlearning import default_eval_config
from raysae.worlds import load_world

ORTH = Path(__file__).parent.parent.parent / "search_spaces" / "orth.yaml"
GIB = 1 << 30


def config(**overrides: Any) -> RunConfig:
    values = {name.replace("__", "."): value for name, value in overrides.items()}
    return resolve(load_config(ORTH, values))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what is free of memory and /dev/shm."""

    def set_to(memory: int, shared: int) -> None:
        found = psutil.virtual_memory()._replace(available=memory)
        monkeypatch.setattr(sizes.psutil, "virtual_memory", lambda: found)
        monkeypatch.setattr(sizes, "_free_shared_memory", lambda: shared)

    return set_to


def test_no_more_sequences_are_evaluated_than_saebench_takes():
    assert default_eval_config(load_world("embedded")).dataset_size == EVALUATION_SEQUENCES


def test_the_evaluation_cache_holds_sequences_and_padded_prompts():
    from transformers import AutoTokenizer

    world = load_world("embedded")
    tokenizer: Any = AutoTokenizer.from_pretrained(world.model_path)
    assert world.known_questions is not None
    prompts = [world.ask(name, i) for name, ids in world.known_questions.items() for i in ids]
    longest = max(len(ids) for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"])
    tokens = 0
    for texts in (world.forget_texts[:1024], world.retain_texts):  # SAEBench draws 1024 to forget
        joined = tokenizer(tokenizer.eos_token.join(texts))["input_ids"]
        tokens += min(1024, len(joined) // world.seq_len) * world.seq_len
    wanted = tokens + len(prompts) * longest
    assert corpus_size(world).evaluated == pytest.approx(wanted, rel=0.05)


def test_bytes_follow_from_the_types_of_model_and_store():
    world, size = load_world("embedded"), CorpusSize(1, 1000, 1, 500)
    plain = store_size(config(), world, size)
    assert (plain.activations, plain.evaluation) == (1000 * (512 + 8), 500 * (512 + 8))
    half = replace(world, dtype="bfloat16")
    small = store_size(config(resources__store_dtype="bfloat16"), half, size)
    assert (small.activations, small.evaluation) == (1000 * (256 + 8), 500 * (256 + 8))
    alone = store_size(config(objective__evaluator="saebench"), world, size)
    assert (alone.evaluation, alone.total) == (0, alone.activations)


def test_a_model_takes_what_its_type_takes():
    world = load_world("embedded")
    weights = world.model_path / "model.safetensors"
    parameters = sum(tensor.numel() for tensor in load_file(weights).values())
    assert model_bytes(world) == 4 * parameters
    assert model_bytes(replace(world, dtype="bfloat16")) == 2 * parameters


def test_the_quick_bound_is_one():
    world = load_world("embedded")
    quick, counted = largest_corpus_size(world), corpus_size(world)
    for name, value in vars(counted).items():
        assert getattr(quick, name) >= value > 0


def test_the_default_search_asks_for_no_more_than_a_gibibyte_and_counts_no_token(
    machine: Any, monkeypatch: pytest.MonkeyPatch
):
    machine(64 * GIB, 32 * GIB)
    monkeypatch.setattr(sizes, "corpus_size", lambda _: pytest.fail("tokens were counted"))
    assert choose_store_memory(config(), load_world("embedded")) == GIB


@pytest.mark.parametrize(
    ("memory", "shared", "expected"),
    [
        (64 * GIB, 32 * GIB, None),  # what it needs
        (8 * GIB, 32 * GIB, 4 * GIB),  # half of the memory
        (64 * GIB, 3 * GIB, int(0.9 * 3 * GIB)),
        (1 * GIB, 64 << 20, LEAST_STORE),
    ],
)
def test_a_large_search_gets_what_it_needs_as_far_as_the_machine_has_it(
    machine: Any, monkeypatch: pytest.MonkeyPatch, memory: int, shared: int, expected: int | None
):
    machine(memory, shared)
    size = CorpusSize(1, 10_000_000, 1, 2_000_000)
    for name in ("corpus_size", "largest_corpus_size"):
        monkeypatch.setattr(sizes, name, lambda _: size)
    needed = 12_000_000 * (512 + 8)
    expected = int(np.ceil(needed / MEMORY_SHARE)) if expected is None else expected
    assert choose_store_memory(config(), load_world("embedded")) == expected


def test_bytes_that_are_asked_for_are_taken_or_refused(machine: Any):
    machine(8 * GIB, 4 * GIB)
    world = load_world("embedded")
    assert choose_store_memory(config(resources__store_memory=3 * GIB), world) == 3 * GIB
    with pytest.raises(UserError, match=r"resources.store_memory: 5.0 GiB, and 4.0 GiB of /dev"):
        choose_store_memory(config(resources__store_memory=5 * GIB), world)
    with pytest.raises(UserError, match="at least 83,886,080"):
        config(resources__store_memory=1000)
    with pytest.raises(UserError, match="auto, or a whole number of bytes"):
        config(resources__store_memory="2 GiB")
