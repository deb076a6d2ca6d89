"""How often features fire together."""

from __future__ import annotations

import torch
from torch import Tensor

from raysae.regularizers.activations import Activations

OBSERVATIONS_PER_PERIOD = 8
"""Batches observed between two updates, so that a long period costs little."""

PROFILE_WIDTH = 1024
"""Columns of a co-firing profile. A wider SAE's features share columns (feature j is in column
j mod 1024): k-means sees distances between profiles only, which such sums keep (count sketch)."""


def is_observed(step: int, period: int) -> bool:
    """Whether the batch of a step is looked at; that of an update always is."""
    return (step % period) % max(1, period // OBSERVATIONS_PER_PERIOD) == 0


def cofiring_counts(acts: Activations) -> Tensor:
    """Tokens on which feature i fires together with the features of column b.

    Returns:
        (d_sae, columns), columns = min(d_sae, PROFILE_WIDTH); of a pair of features if d_sae fits.
    """
    fired = (acts.values > 0).to(torch.float32)
    columns = min(acts.d_sae, PROFILE_WIDTH)
    return acts.transposed_product(fired, acts.folded(fired, columns))


def moving_average(average: Tensor, value: Tensor, observations: Tensor, ema: float) -> None:
    """Fold `value` into `average` in place; the first replaces the initial zeros."""
    keep = torch.where(observations > 0, ema, 0.0).to(average.dtype)
    average.mul_(keep).add_(value * (1 - keep))


def normalised_cofiring(cofiring: Tensor) -> Tensor:
    """Share of the rarer feature's tokens on which both fire, in [0, 1]; 0 where one never fires.

    Args:
        cofiring: rates of firing together (…, n, n), firing rates on the diagonal.
    """
    rate = cofiring.diagonal(dim1=-2, dim2=-1)
    rarer = torch.minimum(rate[..., :, None], rate[..., None, :])
    share = torch.where(rarer > 0, cofiring / rarer.clamp_min(1e-12), torch.zeros_like(cofiring))
    return share.clamp(0, 1)


def cofiring_profiles(cofiring: Tensor) -> Tensor:
    """Unit-norm profile of every feature: with whom it fires, frequent company counting less.

    Args:
        cofiring: moving average of `cofiring_counts` a token (d_sae, columns).

    Returns:
        (d_sae, columns): co-firing over the square root of the column's firing; 0 for a feature
        that never fires.
    """
    column = cofiring.sum(0)
    scaled = torch.where(column > 0, cofiring / column.clamp_min(1e-12).sqrt(), cofiring)
    return torch.nn.functional.normalize(scaled, dim=1)
