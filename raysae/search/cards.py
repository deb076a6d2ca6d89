"""What a search takes on GPUs that are not here: its counts, divided by assumed rates."""

from __future__ import annotations

from raysae.config import RunConfig
from raysae.worlds.presets import Shape

CARDS = {"a 24 GB card": 20e12, "an 80 GB card": 35e12, "8 cards of 80 GB": 8 * 35e12}
"""Operations a second of float32 training steps: assumptions; measure one trial."""


def on_cards(config: RunConfig, shape: Shape) -> list[str]:
    """Lines of a plan: bytes of the store where the world limits it, and hours by card.

    Training alone: scoring, harvest and penalties come on top, early stopping takes two thirds of
    most trials off.
    """
    lines = []
    if shape.store_tokens is not None:
        width = shape.d_model * (2 if config.resources.store_dtype == "bfloat16" else 4)
        tokens = 2 * shape.store_tokens
        lines.append(
            f"corpora      at most {tokens:,} tokens are harvested: {tokens * width / 1e9:.1f} GB"
        )
    if config.resources.use_gpu:
        trial = 12 * config.training.tokens * shape.d_model * config.sae.d_sae
        hours = {card: trial / rate / 3600 for card, rate in CARDS.items()}
        lines.append("on GPUs      training alone, every trial to its end, at assumed rates:")
        lines += [
            f"               {each:.2f} h a trial and {config.num_trials * each:.1f} h in all at "
            f"{CARDS[card] / 1e12:.0f} TFLOP/s ({card})"
            for card, each in hours.items()
        ]
    return lines
