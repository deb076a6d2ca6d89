"""Decoder rows of norm 1, as SAEBench's multipliers want them, of an SAE that has others."""

from __future__ import annotations

import warnings
from typing import Any

from sae_bench.sae_bench_utils.general_utils import check_decoder_norms


def fold_decoder_norms(sae: Any) -> str | None:
    """Move the norms of decoder rows into the encoder, in place, as SAEBench does with releases.

    What the SAE reconstructs, and which features fire, stays the same.

    Returns what was done, in words; None where the norms are 1 already.

    Raises ValueError where SAELens cannot do it without changing which features fire, or a row is
    zero.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if check_decoder_norms(sae.W_dec.data):
            return None
    norms = sae.W_dec.data.norm(dim=1)
    low, high = norms.min().item(), norms.max().item()
    found = f"decoder rows of norms from {low:.6g} to {high:.6g}"
    if low == 0:
        raise ValueError(f"{found}: a row of zeros has no direction that could be clamped")
    try:
        sae.fold_W_dec_norm()
    except NotImplementedError as error:
        raise ValueError(f"{found}, which SAELens cannot fold into the encoder: {error}") from None
    return f"{found} were folded into the encoder, as SAEBench does with releases"
