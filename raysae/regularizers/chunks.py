"""Features in random chunks: for what needs every cosine itself, at a cost linear in d_sae."""

from __future__ import annotations

import torch
from torch import Tensor

from raysae.regularizers.layout import layout


def draw_chunks(d_sae: int, chunk_size: int, seed: int) -> Tensor:
    """Chunk label (d_sae,) of every feature: a seeded shuffle, cut into chunks of equal size.

    Args:
        d_sae: number of features.
        chunk_size: features a chunk at most.
        seed: the same on every worker, so that all hold the same chunks.
    """
    count = -(-d_sae // chunk_size)
    labels = torch.arange(d_sae) % count
    if count == 1:
        return labels
    return labels[torch.randperm(d_sae, generator=torch.Generator().manual_seed(seed))]


def by_chunk(rows: Tensor, chunks: Tensor) -> Tensor:
    """Rows (d_sae, d) → (chunks, largest chunk, d); smaller chunks are filled up with zeros.

    Within a chunk features keep their order.
    """
    places, there = layout(chunks).padded
    laid_out = rows.index_select(0, places.flatten()).view(*places.shape, -1)
    return laid_out if there is None else laid_out.where(there, 0)
