"""Which rows make up a batch: a pure function of (seed, step), the same on every machine."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

StoreDtype = Literal["float32", "bfloat16"]
CORPORA = ("forget", "retain")


def batch_rows(
    n_rows: int, seed: int, step: int, batch_size: int, rank: int = 0, size: int = 1
) -> np.ndarray:
    """Row numbers of this worker's share of the batch of one step.

    An epoch is a seeded permutation of all rows, cut into whole batches (the remainder, less than a
    batch, is left out of that epoch); every epoch has its own permutation. Rank r takes positions
    r, r + size, … of the batch, so the workers of a trial together see what one worker would.

    Args:
        n_rows: rows in the store; at least `batch_size`.
        seed, step: of the trial, and its training step from 0.
        batch_size: rows of the whole batch.
        rank, size: the worker's place in its trial.

    Returns:
        int64 (⌈(batch_size − rank) / size⌉,)

    Raises:
        ValueError: a batch is larger than the store.
    """
    if batch_size > n_rows:
        raise ValueError(f"batch_size {batch_size} is larger than the store ({n_rows} rows)")
    epoch, position = divmod(step, n_rows // batch_size)
    order = _permutation(n_rows, seed, epoch)
    return order[position * batch_size + rank : (position + 1) * batch_size : size]


@lru_cache(maxsize=4)
def _permutation(n_rows: int, seed: int, epoch: int) -> np.ndarray:
    order = np.random.default_rng([seed, epoch]).permutation(n_rows)
    order.setflags(write=False)
    return order


class ChunkedActivations:
    """Batches from read-only chunks; implements `raysae.training.loop.ActivationSource`.

    Chunks stay where they are (shared memory of the node); only the rows of a batch are copied.
    """

    def __init__(
        self,
        chunks: list[np.ndarray],
        is_forget: np.ndarray,
        *,
        scale: float,
        mean: np.ndarray,
        variance: float,
        device: str = "cpu",
    ) -> None:
        """
        Args:
            chunks: activations (rows, d_in) float32, or int16 that holds bfloat16.
            is_forget: label of every row over all chunks, bool (n_rows,).
            scale: factor on the raw activations.
            mean: of the raw activations (d_in,).
            variance: E‖x − mean‖² of the raw activations.
        """
        self._chunks = chunks
        self._starts = np.cumsum([0] + [len(chunk) for chunk in chunks])
        self._is_forget = is_forget
        self._device = torch.device(device)
        self.n_rows = int(self._starts[-1])
        if len(is_forget) != self.n_rows:
            raise ValueError(f"{len(is_forget)} labels for {self.n_rows} rows")
        self.d_in = int(chunks[0].shape[1])
        self.scale = scale
        self.mean = torch.tensor(mean, dtype=torch.float32, device=self._device) * scale
        self.variance = variance * scale**2

    def batch(
        self, seed: int, step: int, batch_size: int, rank: int = 0, size: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Scaled float32 activations (rows, d_in) and is_forget (rows,) on the device."""
        rows = batch_rows(self.n_rows, seed, step, batch_size, rank, size)
        chunk_of = np.searchsorted(self._starts, rows, side="right") - 1
        out = torch.empty(len(rows), self.d_in)
        for index in np.unique(chunk_of):
            mask = chunk_of == index
            values = torch.from_numpy(self._chunks[index][rows[mask] - self._starts[index]])
            if values.dtype == torch.int16:
                values = values.view(torch.bfloat16)
            out[torch.from_numpy(mask)] = values.float()
        labels = torch.from_numpy(self._is_forget[rows])
        return (out * self.scale).to(self._device), labels.to(self._device)


def add_up(sums: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums over several chunks → rows, bytes, `scale` = √d_in / E‖x‖, mean (d_in,), variance.

    The variance is E‖x − mean‖², in raw units.
    """
    total = {key: sum(part[key] for part in sums) for key in sums[0]}
    rows = int(total["rows"])
    mean = total["x"] / rows
    return {
        "rows": rows,
        "bytes": int(total["bytes"]),
        "scale": float(len(mean) ** 0.5 / (total["norm"] / rows)),
        "mean": mean.astype(np.float32),
        "variance": float(total["norm2"] / rows - (mean**2).sum()),
    }
