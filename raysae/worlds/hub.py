"""Worlds from the Hugging Face hub: a published model, SAEBench's questions and corpora.

Everything is fetched by Hugging Face's own libraries into their own caches, once; a machine without
a network runs from a cache that was filled before.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from raysae.worlds.world import FORGET_SET, RETAIN_SETS, Question, World

FORGET_CORPUS = "cais/wmdp-bio-forget-corpus"
"""Gated: its owners grant access on the hub, to the account whose token is in HF_TOKEN."""
RETAIN_CORPUS = ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
MIN_CHARACTERS = 50
"""SAEBench drops shorter texts."""


@dataclass(frozen=True)
class HubModel:
    """A published model and where its SAEs are trained; sizes are known before it is fetched."""

    repository: str
    saebench_model_name: str
    n_layers: int
    d_model: int
    default_layer: int
    seq_len: int = 1024


MODELS = {
    "gemma-2-2b": HubModel("google/gemma-2-2b-it", "gemma-2-2b-it", 26, 2304, 19),
}
"""By world name. Layer 19 is the seed study's; SAEBench's unlearning evaluation knows gemma-2-2b as
its instruction-tuned variant only."""


def load(name: str) -> World:
    """Fetch a hub world, or read it from the cache.

    Raises:
        ConnectionError: something is neither cached nor to be had; says what, and what it needs.
    """
    from datasets import load_dataset
    from huggingface_hub import snapshot_download

    model = MODELS[name]

    def fetched(what: str, fetch: Callable[[], Any]) -> Any:
        try:
            return fetch()
        except Exception as error:  # hub, file system and parser raise dozens of types
            raise ConnectionError(
                f"world {name!r} needs {what}, which is neither in the Hugging Face cache nor to "
                f"be had from the hub ({type(error).__name__}); it takes a network, an account "
                "that was granted access (HF_TOKEN), and HF_HUB_OFFLINE unset"
            ) from error

    patterns = ["*.json", "*.safetensors", "tokenizer.model"]
    path = fetched(
        model.repository, lambda: snapshot_download(model.repository, allow_patterns=patterns)
    )
    forget = fetched(FORGET_CORPUS, lambda: load_dataset(FORGET_CORPUS, split="train"))
    repository, config, split = RETAIN_CORPUS
    retain = fetched(repository, lambda: load_dataset(repository, config, split=split))
    questions = {FORGET_SET: fetched("cais/wmdp", lambda: _questions("cais/wmdp", FORGET_SET))}
    for subject in RETAIN_SETS:
        questions[subject] = fetched("cais/mmlu", partial(_questions, "cais/mmlu", subject))
    # Workers read what this process has just cached.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return World(
        name=name,
        model_path=Path(path),
        saebench_model_name=model.saebench_model_name,
        default_hook_name=f"blocks.{model.default_layer}.hook_resid_post",
        seq_len=model.seq_len,
        forget_texts=tuple(t for t in forget["text"] if len(t) > MIN_CHARACTERS),
        retain_texts=tuple(t for t in retain["text"] if len(t) > MIN_CHARACTERS),
        questions=MappingProxyType(questions),
        known_questions=None,
    )


def _questions(repository: str, subject: str) -> tuple[Question, ...]:
    from datasets import load_dataset

    rows = load_dataset(repository, subject, split="test")
    return tuple(Question(r["question"], tuple(r["choices"]), int(r["answer"])) for r in rows)
