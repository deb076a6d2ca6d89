"""OrtSAE: each feature is pushed away from its nearest neighbour in a random chunk."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from raysae.products import matmul
from raysae.regularizers.base import OrthogonalityRegularizer, State
from raysae.regularizers.chunks import by_chunk, draw_chunks
from raysae.regularizers.gram import unit_rows
from raysae.regularizers.periodic import PeriodicRegularizer


class OrtSAEChunked(PeriodicRegularizer, OrthogonalityRegularizer):
    """penalty = c · mean over i of (max over j ≠ i in i's chunk of max(cos(W_i, W_j), 0))².

    OrtSAE (Korznikov et al., 2025, arXiv 2509.22033), with features reshuffled into chunks every
    `group_update_period` steps (there: every step). c = d_in / (2 ln s), s the largest chunk, is
    the paper's penalty in units of random directions: the largest of s independent N(0, 1/d_in)
    has a square of about 2 ln(s) / d_in.
    """

    name: ClassVar[str] = "ortsae_chunked"
    searchable: ClassVar[frozenset[str]] = PeriodicRegularizer.searchable | {"chunk_size"}

    group_update_period: int = Field(1, ge=1, description="steps between two shuffles")
    chunk_size: int = Field(512, ge=2, description="features a chunk, at most")

    def init_state(self, d_in: int, d_sae: int, device: torch.device) -> State:
        return {"chunks": draw_chunks(d_sae, self.chunk_size, 0).to(device)}

    def update(self, state: State, statistics: State, W_dec: Tensor, step: int) -> None:
        if self.is_update(step):
            state["chunks"].copy_(draw_chunks(len(W_dec), self.chunk_size, step))

    def decoder_penalty(self, W_dec: Tensor, state: State) -> Tensor:
        n, d_in = W_dec.shape
        U = by_chunk(unit_rows(W_dec), state["chunks"])
        with torch.no_grad():
            cosines = matmul(U, U.transpose(1, 2))
            cosines.diagonal(dim1=1, dim2=2).fill_(-1)  # a feature is not its own neighbour
            neighbours = _argmax(cosines)
        # The gradient of a maximum is that of the pair that attains it; the zeros that fill a
        # chunk are neighbours at a cosine of 0, which costs nothing.
        nearest = _rows(U, neighbours)
        cosine = (U * nearest).sum(2).relu()
        return cosine.pow(2).sum() * (d_in / (2 * n * math.log(max(2, U.shape[1]))))


def _argmax(cosines: Tensor) -> Tensor:
    """Of the last of three axes; NumPy's is ten times as fast as PyTorch's on a CPU."""
    if cosines.is_cuda:
        return cosines.argmax(2)
    return torch.from_numpy(cosines.numpy().argmax(2))


def _rows(U: Tensor, at: Tensor) -> Tensor:
    """Rows of each chunk of `U` (chunks, s, d_in) at its own `at` (chunks, s)."""
    if U.is_cuda:
        return U.gather(1, at[..., None].expand_as(U))
    chunks, s, _ = U.shape
    first = torch.arange(0, chunks * s, s)[:, None]
    return U.flatten(0, 1).index_select(0, (at + first).flatten()).view_as(U)
