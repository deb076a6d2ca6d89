"""A GPU that does not hold a batch of the language model, said as the setting to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from sae_bench.evals.unlearning.eval_config import UnlearningEvalConfig

from raysae.errors import UserError, first_line


@contextmanager
def batches_fit(config: UnlearningEvalConfig, d_vocab: int) -> Iterator[None]:
    """Raise UserError, naming the world's batch size, where torch runs out of memory inside.

    SAEBench takes the logits of every position of a batch of prompts. Those of the answering ones
    alone would be a product of another shape, which a GPU may round otherwise; in bfloat16 answers
    that tie would then fall to another letter, and other questions be known.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        size = config.llm_batch_size
        raise UserError(
            f"world.llm_batch_size: the GPU's memory does not hold what the language model makes "
            f"of {size} sequences or {2 * size} prompts, of which SAEBench takes the logits of all "
            f"{d_vocab:,} tokens at every position ({first_line(error)}); set it lower than {size}"
            + (", or world.dtype to bfloat16" if config.llm_dtype == "float32" else "")
            + "; other processes on the GPU count as well"
        ) from error
