"""How a feature fires on either task's tokens: the statistic behind masks and inhibition."""

from __future__ import annotations

import torch
from torch import Tensor

from raysae.regularizers.base import State, StepView
from raysae.regularizers.cofiring import moving_average


def init_task_rates(d_sae: int, device: torch.device) -> State:
    """State: firing rates, mean activations and the forget corpus' share of the tokens."""
    return {
        "firing_rate": torch.zeros(2, d_sae, device=device),  # forget, retain
        "activation": torch.zeros(2, d_sae, device=device),  # mean over the task's tokens
        "task_share": torch.full((2,), 0.5, device=device),  # of this batch's tokens
        "observations": torch.zeros((), dtype=torch.long, device=device),
    }


def task_statistics(view: StepView) -> State:
    """Sums over the batch."""
    acts, is_forget = view.activations, view.is_forget
    fired = (acts.values > 0).to(acts.values.dtype)
    return {
        "fired": acts.sum_by_task(fired, is_forget).float(),
        "activation": acts.sum_by_task(acts.values, is_forget).float(),
        "tokens": torch.stack([is_forget, ~is_forget]).sum(1).float(),
    }


def update_task_rates(state: State, statistics: State, ema: float) -> None:
    """Fold the sums of a batch into the moving averages."""
    tokens = statistics["tokens"]
    per_token = 1 / tokens.clamp_min(1)[:, None]
    moving_average(
        state["firing_rate"], statistics["fired"] * per_token, state["observations"], ema
    )
    moving_average(
        state["activation"], statistics["activation"] * per_token, state["observations"], ema
    )
    state["task_share"].copy_(tokens / tokens.sum())
    state["observations"] += 1


def selectivity(state: State) -> Tensor:
    """(d_sae,) (p_forget − p_retain) / (p_forget + p_retain), in [−1, 1]; 0 if it never fires."""
    forget, retain = state["firing_rate"]
    total = forget + retain
    return torch.where(total > 0, (forget - retain) / total.clamp_min(1e-12), total)


def mean_over_task(values: Tensor, view: StepView, state: State) -> Tensor:
    """Means over forget tokens and over retain tokens, (2, d_sae).

    Divided by the task's share of the *whole* batch, so that the mean over data-parallel workers is
    the whole batch's mean, however its tokens fall to the workers.

    Args:
        values: in the place of the view's activations; 0 wherever a feature does not fire.
        view: of the batch.
        state: with the rates of this step.
    """
    expected = state["task_share"].to(values.dtype) * len(view.is_forget)
    # A task without a token in the batch has nothing to average: 0, not 0 / 0.
    sums = view.activations.sum_by_task(values, view.is_forget)
    return sums / expected.clamp_min(1e-6)[:, None]
