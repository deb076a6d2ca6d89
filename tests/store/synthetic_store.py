"""A store of random rows in Ray's object store, as a harvest would have left it."""

from __future__ import annotations

import numpy as np
import ray
import torch

from raysae.store.chunks import Moments, add_up
from raysae.store.files import checksum
from raysae.store.handle import HeldChunk, StoreHandle


def put_store(dtype: str, chunks: int = 8, rows: int = 16_384, width: int = 256) -> StoreHandle:
    """As many chunks of so many rows, by turns of both corpora; Ray must be up."""
    rng, held, moments = np.random.default_rng(0), [], []
    for _ in range(chunks):
        values = rng.standard_normal((rows, width), dtype=np.float32)
        moments.append(
            Moments(rows, values.sum(0, np.float64), rows * width**0.5, float(rows * width))
        )
        if dtype == "bfloat16":
            values = torch.from_numpy(values).bfloat16().view(torch.int16).numpy()
        origin = ray.put(np.zeros((2, rows), np.int32))
        held.append(HeldChunk(ray.put(values), origin, checksum(values)))
    corpora = ["forget" if i % 2 == 0 else "retain" for i in range(chunks)]
    labels = np.repeat([name == "forget" for name in corpora], rows)
    nbytes = chunks * rows * width * (4 if dtype == "float32" else 2)
    return StoreHandle(tuple(held), labels, add_up(corpora, moments), None, nbytes)
