"""One training step: (SAE, batch, regularizer state) → losses. Nothing here knows about Ray."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from sae_lens.saes.sae import TrainingSAE, TrainStepInput
from torch import Tensor

from raysae.regularizers import Regularizer, State, StepView
from raysae.training.collective import Alone
from raysae.training.stability import GroupStability

RATE_EMA = 0.98
"""Weight of the past, per step, in the firing rates behind the measured overlap."""


@dataclass
class FiringRecord:
    """Which features are alive, and how often each fires on forget and retain tokens."""

    steps_since_fired: Tensor  # (d_sae,)
    fired_forget: Tensor  # (d_sae,) token counts since the last reset
    fired_retain: Tensor
    tokens_forget: Tensor  # scalar
    tokens_retain: Tensor
    recent_forget: Tensor  # (d_sae,) moving average of the firing rate on the task's tokens
    recent_retain: Tensor

    @classmethod
    def zeros(cls, d_sae: int, device: torch.device) -> FiringRecord:
        def zero(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device)

        return cls(zero(d_sae), zero(d_sae), zero(d_sae), zero(), zero(), zero(d_sae), zero(d_sae))

    def add(self, fired: Tensor, tokens: Tensor) -> None:
        """Add a batch.

        Args:
            fired: forget and retain tokens on which each feature fires (2, d_sae).
            tokens: forget and retain tokens (2,).
        """
        self.fired_forget += fired[0]
        self.fired_retain += fired[1]
        self.tokens_forget += tokens[0]
        self.tokens_retain += tokens[1]
        rates = fired / tokens[:, None].clamp_min(1)
        self.recent_forget.lerp_(rates[0], 1 - RATE_EMA)
        self.recent_retain.lerp_(rates[1], 1 - RATE_EMA)
        self.steps_since_fired += 1
        self.steps_since_fired.masked_fill_(fired.sum(0) > 0, 0)

    def rates(self) -> tuple[Tensor, Tensor]:
        """Firing rates on forget and on retain tokens (d_sae,) since the last reset."""
        return (
            self.fired_forget / self.tokens_forget.clamp_min(1),
            self.fired_retain / self.tokens_retain.clamp_min(1),
        )

    def overlap(self) -> float:
        """How far forget and retain tokens fire the same features of late, in [0, 1].

        Σ_i min(p_i^F, p_i^R) / Σ_i max(p_i^F, p_i^R), 0 when nothing fires. Waits for the device.
        """
        larger = torch.maximum(self.recent_forget, self.recent_retain).sum()
        smaller = torch.minimum(self.recent_forget, self.recent_retain).sum()
        return float(smaller / larger.clamp_min(1e-12))

    def reset_rates(self) -> None:
        """Start counting rates anew; the time since last firing goes on."""
        for counter in (
            self.fired_forget,
            self.fired_retain,
            self.tokens_forget,
            self.tokens_retain,
        ):
            counter.zero_()


@dataclass(frozen=True)
class StepOutput:
    """Losses of one step (scalars on the device, not synchronised) and its reconstruction error."""

    losses: dict[str, Tensor] = field(default_factory=dict)


def train_step(
    sae: TrainingSAE,
    optimizer: torch.optim.Optimizer,
    batch: Tensor,
    is_forget: Tensor,
    *,
    step: int,
    alpha: float,
    coefficients: dict[str, float],
    regularizer: Regularizer,
    regularizer_state: State,
    firing: FiringRecord,
    dead_after: int,
    grad_clip: float,
    collective: Alone,
    stability: GroupStability | None = None,
    autocast: bool = False,
) -> StepOutput:
    """Forward with SAELens' own `training_forward_pass`, add `alpha · penalty`, step, renormalise.

    Args:
        sae: SAELens training SAE.
        optimizer: over `sae.parameters()`.
        batch: this worker's activations (rows, d_in), scaled.
        is_forget: which rows come from the forget corpus (rows,), bool.
        step: index of the step, from 0.
        alpha: weight of the penalty at this step.
        coefficients: the SAE's own loss coefficients at this step (e.g. {"l1": 2.0}).
        regularizer, regularizer_state: the penalty and its state; the state is updated in place.
        firing: counters, updated in place.
        dead_after: steps without firing after which a feature counts as dead.
        grad_clip: global norm at which gradients are clipped.
        collective: joins the workers of a data-parallel trial.
        stability: told of the regularizer's groups; None: nobody is.
        autocast: the SAE's own products in bfloat16.
    """
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=autocast):
        output = sae.training_forward_pass(
            TrainStepInput(
                sae_in=batch,
                coefficients=coefficients,
                dead_neuron_mask=firing.steps_since_fired > dead_after,
                n_training_steps=step,
                is_logging_step=False,
            )
        )
    error = output.sae_out - batch
    # Counts over a batch do not fit bfloat16.
    view = StepView(sae.W_dec, output.feature_acts.to(batch.dtype), is_forget, error)
    with torch.no_grad():
        seen = view.detach()
        statistics = regularizer.statistics(seen, regularizer_state, step)
        for tensor in statistics.values():
            collective.sum_(tensor)
        stability = stability or GroupStability()
        stability.update(regularizer, regularizer_state, statistics, seen.W_dec, step)
        # Equal sums give equal groups on equal machines; a pool of different ones agrees as well.
        for tensor in regularizer_state.values():
            collective.broadcast_(tensor)
        fired = (seen.acts > 0).to(batch.dtype)
        tasks = torch.stack([is_forget, ~is_forget]).to(batch.dtype)
        counts = torch.cat([tasks @ fired, tasks.sum(1, keepdim=True)], 1)
        collective.sum_(counts)
        firing.add(counts[:, :-1], counts[:, -1])

    loss, losses = output.loss, dict(output.losses)
    if regularizer.uses_alpha:
        penalty = regularizer.penalty(view, regularizer_state)
        loss = loss + alpha * penalty
        losses["penalty"] = penalty
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [p for p in sae.parameters() if p.requires_grad]
    collective.mean_gradients_(parameters)
    torch.nn.utils.clip_grad_norm_(parameters, grad_clip)
    optimizer.step()

    with torch.no_grad():
        sae.W_dec.div_(sae.W_dec.norm(dim=-1, keepdim=True).clamp_min(1e-8))
        threshold = getattr(sae, "topk_threshold", None)
        if threshold is not None and collective.size > 1:
            collective.sum_(threshold).div_(collective.size)
        losses = {name: value.detach() for name, value in losses.items()}
        losses |= {"loss": loss.detach(), "squared_error": seen.error.pow(2).sum()}
        losses["fired"] = fired.sum()
    return StepOutput(losses)
