"""Whether batches of the size and forget share that a search asks for can be had of its corpora."""

from __future__ import annotations

from math import ceil, floor

from raysae.config import RunConfig
from raysae.training.mixture import forget_rows


def batch_misfit(config: RunConfig, forget: int, retain: int, about: str = "") -> str:
    """Why some trial of the search could not be trained on such corpora, and what could; "" if all
    can.

    Args:
        config: of the search.
        forget, retain: rows of the corpora.
        about: "about " where they are estimates.
    """
    for share, batch in sorted(_batches(config), key=lambda pair: (pair[1], pair[0] or 0.0)):
        if batch > forget + retain:
            return (
                f"training.batch_size: {batch:,} rows, and the corpora have {about}"
                f"{forget + retain:,}; set training.batch_size to less, or take longer texts"
            )
        if share is not None:
            wrong = _wrong_share(share, batch, forget, retain, about)
            if wrong:
                return f"training.forget_share: {share:g} of {batch:,} rows a batch {wrong}"
    return ""


def _batches(config: RunConfig) -> set[tuple[float | None, int]]:
    """Forget share and batch size of the trials at the ends of what is searched, or of the runs."""
    if config.space is not None:
        fields = [corner["training"] for corner in config.space.corners()]
    else:
        fields = [run.training for run in (config.runs or {}).values()]
    whole = [config.training.model_dump() | own for own in fields]
    return {(training["forget_share"], training["batch_size"]) for training in whole}


def _wrong_share(share: float, batch: int, forget: int, retain: int, about: str) -> str:
    n_forget = forget_rows(share, batch)
    least, most = max(1, batch - retain), min(batch - 1, forget)
    if least <= n_forget <= most:
        return ""
    low, high = ceil(1000 * least / batch) / 1000, floor(1000 * most / batch) / 1000
    advice = (
        f"set it to between {low:g} and {high:g}"
        if 0 < low <= high < 1
        else f"set it so that it is {least:,} to {most:,} rows"
    )
    name, wanted, there = ("forget", n_forget, forget)
    if n_forget <= forget:
        name, wanted, there = ("retain", batch - n_forget, retain)
    return (
        f"asks for {wanted:,} {name} rows, and that corpus has {about}{there:,}; {advice}, or "
        "training.batch_size lower"
    )
