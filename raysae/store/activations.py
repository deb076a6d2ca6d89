"""Tokens → residual-stream activations → chunks and their sums, without Ray."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sae_bench.sae_bench_utils.activation_collection import get_bos_pad_eos_mask
from sae_bench.sae_bench_utils.dataset_utils import tokenize_and_concat_dataset
from transformer_lens import HookedTransformer

from raysae.store.batches import CORPORA, ChunkedActivations, StoreDtype, add_up
from raysae.worlds.world import World, hook_layer

SEQUENCES_PER_FORWARD = 64


def corpus_tokens(world: World, model: HookedTransformer) -> dict[str, np.ndarray]:
    """Token ids of both corpora, int64 (sequences, seq_len), as SAEBench concatenates and cuts."""
    texts = {"forget": world.forget_texts, "retain": world.retain_texts}
    return {
        name: tokenize_and_concat_dataset(model.tokenizer, list(texts[name]), world.seq_len).numpy()
        for name in CORPORA
    }


@torch.no_grad()
def harvest_chunk(
    model: HookedTransformer, tokens: np.ndarray, hook_name: str, dtype: StoreDtype
) -> tuple[np.ndarray, dict[str, Any]]:
    """Activations at the hook of all tokens but BOS, PAD and EOS, and their sums.

    Args:
        model: run up to the hook's layer only.
        tokens: (sequences, seq_len).
        hook_name: e.g. "blocks.0.hook_resid_post".
        dtype: of the chunk; bfloat16 is held as int16, which numpy has.

    Returns:
        (rows, d_in), and float64 sums over the rows: count, x, ‖x‖, ‖x‖², bytes.
    """
    rows = []
    for batch in torch.from_numpy(tokens).split(SEQUENCES_PER_FORWARD):
        _, cache = model.run_with_cache(
            batch, stop_at_layer=hook_layer(hook_name) + 1, names_filter=hook_name
        )
        rows.append(cache[hook_name][get_bos_pad_eos_mask(batch, model.tokenizer)])
    acts = torch.cat(rows)
    exact = acts.double()
    if dtype == "bfloat16":
        chunk = acts.to(torch.bfloat16).view(torch.int16).numpy()
    else:
        chunk = acts.float().numpy()
    sums = {
        "rows": len(acts),
        "x": exact.sum(0).numpy(),
        "norm": float(exact.norm(dim=1).sum()),
        "norm2": float(exact.pow(2).sum()),
        "bytes": chunk.nbytes,
    }
    return chunk, sums


def local_store(
    world: World, model: HookedTransformer, hook_name: str, dtype: StoreDtype = "float32"
) -> ChunkedActivations:
    """The store of a world in this process's own memory: what a search shares through Ray."""
    tokens = corpus_tokens(world, model)
    parts = [harvest_chunk(model, tokens[name], hook_name, dtype) for name in CORPORA]
    facts = add_up([sums for _, sums in parts])
    chunks = [chunk for chunk, _ in parts]
    labels = np.repeat([name == "forget" for name in CORPORA], [len(c) for c in chunks])
    return ChunkedActivations(
        chunks, labels, scale=facts["scale"], mean=facts["mean"], variance=facts["variance"]
    )
