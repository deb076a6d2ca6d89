"""Sizes from texts alone, and the object store that is made for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from raysae.config import RunConfig, find_space, load_config
from raysae.errors import UserError
from raysae.search import sizes
from raysae.search.room import logits_bytes, model_bytes, model_memory
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
from raysae.worlds.presets import PARAMETERS, SIZES
from raysae.worlds.spec import HubWorld

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


# --- GPU memory -----------------------------------------------------------------------------------

LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8}
GEMMA = {"vocab_size": 256000, "head_dim": 256}
CONFIGS: dict[str, tuple[str, dict[str, Any], tuple[int, int, int, int]]] = {
    "google/gemma-2-2b": ("gemma2", GEMMA | {"num_key_value_heads": 4}, (26, 2304, 9216, 8)),
    "google/gemma-2-9b": ("gemma2", GEMMA | {"num_key_value_heads": 8}, (42, 3584, 14336, 16)),
    "EleutherAI/pythia-70m": ("gpt_neox", {"vocab_size": 50304}, (6, 512, 2048, 8)),
    "EleutherAI/pythia-160m": ("gpt_neox", {"vocab_size": 50304}, (12, 768, 3072, 12)),
    "EleutherAI/pythia-410m": ("gpt_neox", {"vocab_size": 50304}, (24, 1024, 4096, 16)),
    "EleutherAI/pythia-1b": ("gpt_neox", {"vocab_size": 50304}, (16, 2048, 8192, 8)),
    "EleutherAI/pythia-1.4b": ("gpt_neox", {"vocab_size": 50304}, (24, 2048, 8192, 16)),
    "EleutherAI/pythia-2.8b": ("gpt_neox", {"vocab_size": 50304}, (32, 2560, 10240, 32)),
    "meta-llama/Llama-3.2-1B": ("llama", LLAMA | {"tie_word_embeddings": True, "head_dim": 64},
                                (16, 2048, 8192, 32)),
    "meta-llama/Llama-3.2-3B": ("llama", LLAMA | {"tie_word_embeddings": True, "head_dim": 128},
                                (28, 3072, 8192, 24)),
    "meta-llama/Llama-3.1-8B": ("llama", LLAMA, (32, 4096, 14336, 32)),
}  # fmt: skip
"""Kind, other settings, and (layers, width, inner width, heads), of the models' own configs."""


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_parameters_of_a_known_model_are_those_that_transformers_makes(name: str):
    kind, settings, (layers, width, inner, heads) = CONFIGS[name]
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": inner}
    made = AutoConfig.for_model(kind, num_attention_heads=heads, **sizes, **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made)
    assert PARAMETERS[name] == sum(p.numel() for p in model.parameters())
    assert SIZES[name] == (layers, width)


def test_a_model_that_is_not_here_takes_what_is_known_of_it():
    made = resolve(load_config(find_space("gemma-2-2b.yaml")))
    assert model_memory(made, None) == 2 * 2_614_341_888
    own = made.model_copy(update={"world": HubWorld(model="some/body", name="own")})
    assert model_memory(own, None) is None


def test_the_logits_of_a_batch_of_questions(tmp_path: Path):
    """In bfloat16, one copy; three where a model caps them."""
    world = SimpleNamespace(model_path=tmp_path, llm_batch_size=3, dtype="bfloat16")
    logits = torch.empty(2 * 3, 50, 1000, dtype=torch.bfloat16)
    (tmp_path / "config.json").write_text('{"vocab_size": 1000}')
    assert logits_bytes(world, 50) == logits.nbytes
    (tmp_path / "config.json").write_text('{"vocab_size": 1000, "final_logit_softcapping": 30.0}')
    assert logits_bytes(world, 50) == 3 * logits.nbytes
