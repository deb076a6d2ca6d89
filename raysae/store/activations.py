"""Tokens → residual-stream activations → chunks, without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sae_bench.sae_bench_utils.activation_collection import get_bos_pad_eos_mask
from torch import Tensor
from transformer_lens import HookedTransformer

from raysae.store.batches import ChunkedActivations
from raysae.store.chunks import CORPORA, Chunk, Moments, StoreDtype, add_up
from raysae.store.texts import tokenize_texts
from raysae.worlds.texts import Texts
from raysae.worlds.world import World, hook_layer

SEQUENCES_PER_FORWARD = 64
TOKENS_PER_FORWARD = 32_768
"""Longer sequences are run fewer at a time."""
MAX_CHARACTERS_PER_TOKEN = 16
"""On average; prose has about four."""


def corpus_tokens(world: World, tokenizer: Any) -> dict[str, np.ndarray]:
    """Token ids to train on, int32 (sequences, seq_len), as SAEBench concatenates and cuts.

    Of each corpus `world.store_tokens` at most, from its beginning.

    Args:
        tokenizer: of the model that is trained on, as `load_model` or `load_tokenizer` has it.
    """
    texts = {"forget": world.forget_texts, "retain": world.retain_texts} | dict(
        world.training_texts
    )
    found = {}
    for name in CORPORA:
        kept = _enough(texts[name], world.store_tokens)
        tokens = tokenize_texts(tokenizer, kept, world.seq_len)
        if world.store_tokens is not None:
            tokens = tokens[: max(1, world.store_tokens // world.seq_len)]
        found[name] = tokens
    return found


def _enough(texts: Texts, tokens: int | None) -> Texts:
    """The first texts that make so many tokens for sure: no need to tokenise a gigabyte."""
    if tokens is None:
        return texts
    kept, characters = list[str](), 0
    for text in texts:
        kept.append(text)
        characters += len(text)
        if characters > tokens * MAX_CHARACTERS_PER_TOKEN:
            break
    return kept


@torch.no_grad()
def harvest_chunks(
    model: HookedTransformer,
    tokens: np.ndarray,
    hook_names: Sequence[str],
    dtype: StoreDtype,
    *,
    first: int = 0,
) -> list[Chunk]:
    """Activations of all tokens but BOS, PAD and EOS, a chunk for each hook.

    Args:
        model: run on its own device, up to the last hook's layer only.
        tokens: (sequences, seq_len), not written to.
        hook_names: e.g. ["blocks.0.hook_resid_post"].
        dtype: of the chunks.
        first: number of the first sequence in its corpus.
    """
    stop_at = max(hook_layer(name) for name in hook_names) + 1
    found: dict[str, list[Tensor]] = {name: [] for name in hook_names}
    masks = []
    at_a_time = max(1, min(SEQUENCES_PER_FORWARD, TOKENS_PER_FORWARD // tokens.shape[1]))
    for batch in torch.from_numpy(tokens).split(at_a_time):
        batch = batch.to(model.cfg.device, torch.int64)
        _, cache = model.run_with_cache(
            batch, stop_at_layer=stop_at, names_filter=lambda name: name in found
        )
        masks.append(get_bos_pad_eos_mask(batch, model.tokenizer))
        for name, rows in found.items():
            rows.append(cache[name][masks[-1]])
    kept = torch.cat(masks).flatten().nonzero().flatten().cpu().numpy()
    origin = {
        "tokens": tokens.flatten()[kept].astype(np.int32),
        "positions": (kept + first * tokens.shape[1]).astype(np.int32),
    }
    chunks = []
    for rows in found.values():
        acts = torch.cat(rows)
        exact = acts.double()
        moments = Moments(
            rows=len(acts),
            x=exact.sum(0).cpu().numpy(),
            norm=float(exact.norm(dim=1).sum()),
            norm2=float(exact.pow(2).sum()),
        )
        values = acts.float() if dtype == "float32" else acts.to(torch.bfloat16).view(torch.int16)
        chunks.append(Chunk(values.cpu().numpy(), **origin, moments=moments))
    return chunks


def local_store(
    world: World, model: HookedTransformer, hook_name: str, dtype: StoreDtype = "float32"
) -> ChunkedActivations:
    """The store of a world in this process's own memory: what a search shares through Ray."""
    tokens = corpus_tokens(world, model.tokenizer)
    chunks = [harvest_chunks(model, tokens[name], [hook_name], dtype)[0] for name in CORPORA]
    labels = np.repeat([name == "forget" for name in CORPORA], [len(c.tokens) for c in chunks])
    moments = add_up(CORPORA, [chunk.moments for chunk in chunks])
    return ChunkedActivations.with_moments([c.activations for c in chunks], labels, moments)
