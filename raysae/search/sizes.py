"""How large a search's activations and evaluation cache are, and the object store made for them.

Imports neither torch nor Ray; the tokenizer only where characters do not settle it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

import psutil

from raysae.config import RunConfig
from raysae.errors import UserError
from raysae.store.tiers import MEMORY_SHARE, human
from raysae.worlds.world import World

SAMPLE = 512
"""Texts of a corpus, and questions, whose tokens are counted; the others by their characters."""
FRAME = 19
"""Tokens that SAEBench puts around a question."""
EVALUATION_SEQUENCES = 1024
"""Of either corpus at most, and so many texts of the forget corpus: SAEBench's `dataset_size`."""
LONG_PROMPTS = 16
"""The longest by their characters: the longest by its tokens is taken to be one of them."""

LEAST_STORE = 1 << 30
"""Ray takes it from the machine as it is filled, and no sooner."""
MOST_OF_MEMORY, MOST_OF_SHM = 0.5, 0.9
"""Shares of what is free that an object store may take: workers need memory of their own."""
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class CorpusSize:
    """What a world's texts amount to, about."""

    sequences: int
    """Of both corpora."""
    rows: int
    """Tokens of which activations are kept."""
    prompt_tokens: int
    """Of all questions together."""
    evaluated: int
    """Tokens at which the evaluation cache holds the residual stream, padding included."""
    forget_rows: int = 0
    """Of `rows`."""
    longest_prompt: int = 0
    """Tokens."""


@dataclass(frozen=True)
class StoreSize:
    """Bytes of what a search computes once and all its workers read."""

    activations: int
    """With each row's token and position."""
    evaluation: int
    """0 where no evaluation cache is used."""

    @property
    def total(self) -> int:
        """Both."""
        return self.activations + self.evaluation


def corpus_size(world: World) -> CorpusSize:
    """Count the tokens of a sample of each corpus, and all characters."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    return _size(world, AutoTokenizer.from_pretrained(world.model_path))


def largest_corpus_size(world: World) -> CorpusSize:
    """What `corpus_size` does not exceed: every character a token. Takes no tokenizer."""
    return _size(world, None)


def store_size(config: RunConfig, world: World, size: CorpusSize) -> StoreSize:
    """Bytes of the search's stores, for a world of that size."""
    width = world.d_model
    # Beside the residual stream: a token's id or whether it counts.
    evaluation = size.evaluated * (width * element_size(world.dtype) + 8)
    return StoreSize(
        activations=size.rows * (width * element_size(config.resources.store_dtype) + 8),
        evaluation=evaluation if config.objective.evaluator == "cached" else 0,
    )


def element_size(dtype: str) -> int:
    """Bytes of one number of a type, by torch's name."""
    return 2 if dtype in ("bfloat16", "float16") else 4


def choose_store_memory(config: RunConfig, world: World | None) -> int:
    """Bytes of the object store of a Ray that is started on this machine.

    As `resources.store_memory` says; `auto` is what activations and evaluation cache need, but no
    less than 1 GiB and no more than memory and /dev/shm have room for.

    Args:
        config: of the search.
        world: None where it is not on this machine.

    Raises:
        UserError: more was asked for than the machine has.
    """
    memory, shared = psutil.virtual_memory().available, _free_shared_memory()
    wanted = config.resources.store_memory
    if wanted == "auto":
        most = int(min(MOST_OF_MEMORY * memory, MOST_OF_SHM * shared))
        return max(LEAST_STORE, min(needed_store_memory(config, world), most))
    for name, free in ((str(SHARED_MEMORY), shared), ("memory", memory)):
        if wanted > free:
            raise UserError(
                f"resources.store_memory: {human(wanted)}, and {human(free)} of {name} are free; "
                "set it lower, or to auto"
            )
    return wanted


def needed_store_memory(config: RunConfig, world: World | None) -> int:
    """Bytes of an object store that holds all of a search, at least `LEAST_STORE`."""
    if world is None:
        return LEAST_STORE
    needed = store_size(config, world, largest_corpus_size(world)).total
    if needed > MEMORY_SHARE * LEAST_STORE:
        needed = store_size(config, world, corpus_size(world)).total
    return max(LEAST_STORE, ceil(needed / MEMORY_SHARE))


def _free_shared_memory() -> int:
    """Bytes; where there is no such file system, Ray's store is in ordinary memory."""
    if not SHARED_MEMORY.is_dir():
        return psutil.virtual_memory().available
    return shutil.disk_usage(SHARED_MEMORY).free


def _size(world: World, tokenizer: Any) -> CorpusSize:
    sequences = evaluated = 0
    rows = {}
    for name, texts in (("forget", world.forget_texts), ("retain", world.retain_texts)):
        tokens, n_texts = _count(tokenizer, texts)
        share = min(1.0, EVALUATION_SEQUENCES / max(1, n_texts)) if name == "forget" else 1.0
        available = int(share * (tokens + n_texts) // world.seq_len)
        evaluated += min(EVALUATION_SEQUENCES, available)
        if name in world.training_texts:
            tokens, n_texts = _count(tokenizer, world.training_texts[name])
        tokens = min(tokens, world.store_tokens or tokens)
        # Between two texts stands one that is not kept, and another at the head of a sequence.
        cut = int((tokens + n_texts) // world.seq_len)
        sequences += cut
        rows[name] = int(cut * (world.seq_len - 1) * tokens / max(1, tokens + n_texts))
    questions = [" ".join((q.question, *q.choices)) for qs in world.questions.values() for q in qs]
    tokens, n_questions = _count(tokenizer, questions)
    known = world.known_questions or world.questions
    prompts = sum(len(known[name]) for name in world.questions)
    longest = _longest_prompt(world, tokenizer)
    return CorpusSize(
        sequences,
        sum(rows.values()),
        int(tokens + FRAME * n_questions),
        evaluated * world.seq_len + prompts * longest,
        rows["forget"],
        longest,
    )


def _longest_prompt(world: World, tokenizer: Any) -> int:
    prompts = [world.ask(name, i) for name, qs in world.questions.items() for i in range(len(qs))]
    prompts = sorted(prompts, key=len)[-LONG_PROMPTS:]
    if tokenizer is None:
        return len(prompts[-1])
    return max(map(len, tokenizer(prompts, add_special_tokens=False)["input_ids"]))


def _count(tokenizer: Any, texts: Iterable[str]) -> tuple[float, int]:
    """Tokens of all texts, about, and their number; characters without a tokenizer."""
    remaining = iter(texts)
    sample = list(islice(remaining, SAMPLE))
    if not sample:
        return 0.0, 0
    characters = max(1, sum(map(len, sample)))
    counted = characters
    if tokenizer is not None:
        counted = sum(map(len, tokenizer(sample, add_special_tokens=False)["input_ids"]))
    n_others, others = 0, 0
    for text in remaining:
        n_others, others = n_others + 1, others + len(text)
    return counted * (1 + others / characters), len(sample) + n_others
