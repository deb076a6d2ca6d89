"""What a search takes on GPUs that are not here: its counts, divided by assumed rates."""

from __future__ import annotations

from raysae.config import RunConfig
from raysae.search.estimate import (
    HALF,
    INTERVENTIONS,
    KNOWN_QUESTIONS,
    LAYER_PARAMETERS,
    QUESTION_TOKENS,
    QUESTIONS,
    SHARED,
    expected_share,
)
from raysae.worlds.presets import Shape
from raysae.worlds.world import hook_layer

CARDS = {"a 24 GB card": (1, 20e12), "an 80 GB card": (1, 35e12), "8 cards of 80 GB": (8, 35e12)}
"""How many, and operations a second of each: assumptions, what products in float32 may reach there.
On a GPU a search multiplies in bfloat16 and TF32, which should take less; measure one trial."""
CACHE_TOKENS = 2 * 1024 * 1024
"""That SAEBench looks at of both corpora to choose features."""


def on_cards(config: RunConfig, shape: Shape) -> list[str]:
    """Lines of a plan: bytes of the store where the world limits it, and hours by card.

    Penalties come on top. GPU hours are those that are paid for, of idle cards too: what is done
    once per model and layer is done by one of them.
    """
    lines = []
    if shape.store_tokens is not None:
        width = shape.d_model * (2 if config.resources.store_dtype == "bfloat16" else 4)
        tokens = 2 * shape.store_tokens
        lines.append(
            f"corpora      at most {tokens:,} tokens are harvested: {tokens * width / 1e9:.1f} GB"
        )
    if not config.resources.on_gpu:
        return lines
    assert config.hook is not None
    above = hook_layer(config.hook) + 1
    layer = 2 * LAYER_PARAMETERS * shape.d_model**2  # operations a token
    once = {
        "known questions": shape.permutations
        * QUESTIONS
        * QUESTION_TOKENS
        * shape.n_layers
        * layer,
        "harvest": 2 * (shape.store_tokens or 0) * above * layer,
        "evaluation cache": CACHE_TOKENS * above * layer,
    }
    # Of the largest SAE and the longest run: operations of one product, a token.
    sae = 2 * shape.d_model * config.extremes("sae", "d_sae")[1]
    training = 6 * sae * config.extremes("training", "tokens")[1]
    known = KNOWN_QUESTIONS * QUESTION_TOKENS
    asking = INTERVENTIONS * SHARED * known * (shape.n_layers - above) * layer
    scoring = sae * (CACHE_TOKENS + known) + asking
    on_the_way = scoring - (1 - HALF) * asking
    share, early, last = expected_share(config)
    saes = config.num_trials * config.search.seeds_per_trial
    confirmed = config.max_confirmed * config.confirm.seeds
    after = confirmed * (training + scoring)
    most = saes * (training + (len(config.rungs) - 1) * on_the_way + scoring) + after
    likely = saes * (share * training + early * on_the_way + last * scoring) + after
    lines.append("on GPUs      at assumed rates of float32, without the penalties:")
    for card, (count, rate) in CARDS.items():
        hours = rate * 3600
        parts = {name: n / hours for name, n in once.items() if n}
        first = sum(parts.values())
        each = ", ".join(f"{name} {_span(h).removesuffix(' h')}" for name, h in parts.items())
        spans = [first + n / hours / count for n in (likely, most)]
        lines += [
            f"               {card}, {rate / 1e12:.0f} TFLOP/s{' each' if count > 1 else ''}: "
            f"{_span(training / hours)} to train an SAE, {_span(scoring / hours, 3)} to score it; "
            f"once {_span(first)} ({each})",
            f"                 in all {_span(spans[0], 1)} with early stopping as expected, "
            f"{_span(spans[1], 1)} with every trial trained to its end: {count * spans[0]:.1f} and "
            f"{count * spans[1]:.1f} GPU hours, times their price",
        ]
    return lines


def _span(hours: float, digits: int = 2) -> str:
    """In hours, or in seconds where so many digits of an hour would be zeros."""
    if hours >= 10**-digits:
        return f"{hours:.{digits}f} h"
    return f"{3600 * hours:.0f} s" if hours >= 1 / 360 else f"{3600 * hours:.1f} s"
