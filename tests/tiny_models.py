"""Random models of a few thousand weights in Hugging Face folders, for any world's tokenizer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
)

from raysae.worlds import World

_SIZES = {
    "vocab_size": 232,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def gpt_neox(**changes: Any) -> GPTNeoXConfig:
    """Two rotary dimensions of eight."""
    return GPTNeoXConfig(**(_SIZES | {"rotary_pct": 0.25} | changes))


def llama(**changes: Any) -> LlamaConfig:
    """Two queries for each key unless `changes` say otherwise."""
    return LlamaConfig(**(_SIZES | {"num_key_value_heads": 2} | changes))


def gemma_2(**changes: Any) -> Gemma2Config:
    """Two queries for each key; a window of eight positions in every other layer."""
    sizes = {"num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8}
    return Gemma2Config(**(_SIZES | sizes | {"sliding_window": 8} | changes))


def with_random_model(
    world: World, folder: Path, config: PreTrainedConfig, *, std: float = 0.3
) -> World:
    """`world` with a model of this form; every weight is random, biases and norms included.

    Weights of the default size make attention heads that choose, so that an early position matters
    to the answer; rounding matters more too.
    """
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for weight in model.parameters():
            weight += (std if weight.ndim > 1 else 0.1) * torch.randn_like(weight)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(world.model_path).save_pretrained(folder)
    return dataclasses.replace(world, model_path=folder)
