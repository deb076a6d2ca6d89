"""A world of random questions for a random model of gemma-2-2b's shape, built where it is to run.

What the weights are does not decide what an evaluation costs; the sizes do, and what fires where.
The tokenizer and the words are the embedded world's, the model's vocabulary is its own.

A random model knows no question. The answer that it gives is therefore made the right one: all
questions are known in the order in which they are asked, as with a model that knows them, and no
other order is asked in an evaluation. Forget and retain questions are drawn from the texts of
their corpora, so that features of the one corpus fire in the questions of the one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from sae_bench.evals.unlearning.utils import metrics
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig, TopKSAE, TopKSAEConfig
from torch import Tensor
from transformer_lens import HookedTransformer
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

from raysae.unlearning.protocol import default_eval_config, saebench_session
from raysae.worlds import World, load_world
from raysae.worlds.model import from_hugging_face
from raysae.worlds.texts import Texts
from raysae.worlds.world import CONTEXT, FORGET_SET, N_CHOICES, RETAIN_SETS, Question


@dataclass(frozen=True)
class Shape:
    """Of the model, and how much it is asked."""

    config: Mapping[str, Any]
    """Arguments of `Gemma2Config`."""
    layers: tuple[int, ...]
    """Behind which the autoencoders lie."""
    d_sae: int
    k: int
    seq_len: int
    sequences: int
    """Of either corpus."""
    words: tuple[int, int]
    """In a question, from and to; its frame and its choices are about 30 tokens."""
    llm_batch_size: int
    """Sequences that the model runs at a time, of questions twice as many."""


_GEMMA_2_2B = {
    "vocab_size": 256_000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "max_position_embeddings": 8192,
}
_TINY = _GEMMA_2_2B | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
}
SHAPES = {
    # A tenth of the questions (533 and 308) and sequences (1024 of either) of published scores.
    "gemma-2-2b": Shape(_GEMMA_2_2B, (5, 12, 19), 16_384, 64, 1024, 102, (50, 155), 32),
    "gemma-2-tiny": Shape(_TINY, (0, 2), 512, 4, 64, 40, (10, 40), 32),
}
STD = 0.03
"""Of the weights: heads choose, and layers stay in bounds by their norms."""


def build(
    name: str, device: str, dtype: str, folder: Path, n_forget: int, n_retain: int
) -> tuple[World, HookedTransformer]:
    """A world whose every question is known in the order asked, and its model on `device`.

    Args:
        name: of `SHAPES`.
        device: ``cuda`` or ``cpu``; the weights are drawn there.
        dtype: torch's name.
        folder: for the model's configuration.
        n_forget: questions to forget.
        n_retain: questions to retain, in four data sets.
    """
    shape, source = SHAPES[name], load_world("embedded")
    config = Gemma2Config(**shape.config, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source.model_path)
    hugging_face = _random_model(config, device, getattr(torch, dtype))
    model = from_hugging_face(hugging_face, tokenizer, max(CONTEXT, shape.seq_len), device)
    world = replace(
        source,
        name=name,
        model_path=folder,
        default_hook_name=f"blocks.{shape.layers[0]}.hook_resid_post",
        seq_len=shape.seq_len,
        forget_texts=_joined(source.forget_texts, tokenizer, shape),
        retain_texts=_joined(source.retain_texts, tokenizer, shape),
        questions=_questions(source, shape, n_forget, n_retain),
        dtype=dtype,
        llm_batch_size=shape.llm_batch_size,
    )
    known = {name: tuple(range(len(of_set))) for name, of_set in world.questions.items()}
    return _answered(replace(world, known_questions=known), model), model


def saes(
    name: str, cache_rows: Tensor, model: HookedTransformer, seed: int = 0
) -> Iterator[tuple[str, SAE[Any]]]:
    """Random SAEs with tied unit rows: the k largest fire; those above a threshold fire, as many.

    Args:
        name: of `SHAPES`.
        cache_rows: (tokens, d_model) at the hook; their mean is the decoder's bias.
        model: its device and type.
        seed: of the directions.
    """
    shape, (device, dtype) = SHAPES[name], (model.W_E.device, model.W_E.dtype)
    rows = cache_rows[:8192].to(device).float()
    generator = torch.Generator(device).manual_seed(seed)
    W_dec = torch.randn(shape.d_sae, rows.shape[1], generator=generator, device=device)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    weights = {"W_dec": W_dec, "W_enc": W_dec.T, "b_dec": rows.mean(0)}
    weights["b_enc"] = torch.zeros(shape.d_sae, device=device)
    acts = (rows - weights["b_dec"]) @ weights["W_enc"]
    kth = acts.kthvalue(shape.d_sae - shape.k + 1, dim=1).values.mean()
    sizes = {"d_in": rows.shape[1], "d_sae": shape.d_sae, "device": str(device)}
    topk = TopKSAE(TopKSAEConfig(**sizes, k=shape.k))
    topk.load_state_dict(weights)
    yield f"topk {shape.k}", topk.to(dtype=dtype)
    jumprelu = JumpReLUSAE(JumpReLUSAEConfig(**sizes))
    jumprelu.load_state_dict(weights | {"threshold": kth.expand(shape.d_sae)})
    yield f"jumprelu {shape.k}", jumprelu.to(dtype=dtype)


@torch.no_grad()
def _random_model(config: Gemma2Config, device: str, dtype: torch.dtype) -> Gemma2ForCausalLM:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Gemma2ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator(device).manual_seed(0)
    for weight in model.parameters():  # each once, the tied embedding too
        weight.normal_(0, STD if weight.ndim > 1 else 0.1, generator=generator)
    return model


def _joined(texts: Texts, tokenizer: Any, shape: Shape) -> tuple[str, ...]:
    """The source's texts, over and over, joined to one for each sequence and just longer."""
    pieces = list(texts)
    lengths = [len(ids) for ids in tokenizer(pieces, add_special_tokens=False)["input_ids"]]
    rng = np.random.default_rng(0)
    joined = []
    for _ in range(shape.sequences):
        text, tokens = [], 0
        while tokens <= shape.seq_len:
            i = int(rng.integers(len(pieces)))
            text.append(pieces[i])
            tokens += lengths[i]
        joined.append(" ".join(text))
    return tuple(joined)


def _questions(
    source: World, shape: Shape, n_forget: int, n_retain: int
) -> Mapping[str, tuple[Question, ...]]:
    """Pieces of the corpora with four words to choose from; the right one is yet to be found."""
    counts = {FORGET_SET: n_forget}
    counts |= {name: math.ceil(n_retain / len(RETAIN_SETS)) for name in RETAIN_SETS}
    rng = np.random.default_rng(1)
    questions = {}
    for name, count in counts.items():
        texts = source.forget_texts if name == FORGET_SET else source.retain_texts
        words = " ".join(texts).split()
        of_set = []
        for _ in range(count):
            length = int(rng.integers(*shape.words))
            start = int(rng.integers(len(words) - length))
            choices = rng.choice(words, N_CHOICES).tolist()
            of_set.append(Question(" ".join(words[start : start + length]), tuple(choices), 0))
        questions[name] = tuple(of_set)
    return MappingProxyType(questions)


def _answered(world: World, model: HookedTransformer) -> World:
    """The world in which the model's own answers, in SAEBench's batches, are the right ones."""
    config = default_eval_config(world)
    questions: dict[str, Sequence[Question]] = {}
    with saebench_session(world, model, config.random_seed):
        for name, of_set in world.questions.items():
            prompts = [world.ask(name, i) for i in range(len(of_set))]
            size = min(len(prompts), config.llm_batch_size * 2)
            probs = metrics.get_output_probs_abcd(
                model, prompts, batch_size=size, n_batches=-(-len(prompts) // size), verbose=False
            )
            letters = probs.argmax(dim=1).tolist()
            questions[name] = tuple(
                replace(q, answer=letter) for q, letter in zip(of_set, letters, strict=True)
            )
    return replace(world, questions=MappingProxyType(questions))
