"""One SAE in training: its weights, optimiser, schedules, regularizer state and counters.

`raysae.training.loop` drives it, alone or together with others.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from sae_lens import SAE
from sae_lens.saes.sae import TrainCoefficientConfig, TrainingSAE
from sae_lens.training.optim import CoefficientScheduler, get_lr_scheduler
from torch import Tensor

from raysae.training.collective import Alone
from raysae.training.precision import tf32
from raysae.training.saes import export_sae, make_training_sae
from raysae.training.spec import TrialSpec
from raysae.training.stability import GroupStability
from raysae.training.step import FiringRecord, train_step

if TYPE_CHECKING:
    from raysae.unlearning import UnlearningResult  # brings SAEBench, which training needs not

EXPLODED = 1e4
"""A loss this many times the first one will not come back."""


class TrainingDivergedError(Exception):
    """The loss is not finite, or has exploded.

    `last_good` is the SAE in raw units at step `last_good_step`, the last logged one before; None
    if there was none.
    """

    def __init__(self, message: str, last_good: SAE | None, last_good_step: int) -> None:
        super().__init__(message)
        self.last_good, self.last_good_step = last_good, last_good_step


class ActivationSource(Protocol):
    """Where batches come from. Activations are multiplied by `scale` so that E‖x‖ = √d_in."""

    d_in: int
    scale: float
    mean: Tensor  # (d_in,), scaled
    variance: float  # E‖x − mean‖², scaled

    def batch(
        self, seed: int, step: int, batch_size: int, rank: int = 0, size: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Rows `rank::size` of the batch of that step: activations and is_forget."""
        ...

    def batches(
        self, seeds: Sequence[int], step: int, batch_size: int, rank: int = 0, size: int = 1
    ) -> tuple[Tensor, Tensor]:
        """`batch` of each seed: (seeds, rows, d_in) and (seeds, rows)."""
        ...

    def with_forget_share(self, forget_share: float) -> ActivationSource:
        """The same rows, with this share of forget rows in every batch."""
        ...

    def done_with(self, seeds: Collection[int]) -> None:
        """Told that nobody trains on batches of these seeds any more: what lies ready may go."""
        ...


@dataclass(frozen=True)
class UnderWay:
    """A row of the training curve that is not yet one."""

    steps: int
    sums: dict[str, Tensor]
    """Losses by name, summed over these steps by each worker of the trial, (workers,)."""


@dataclass(frozen=True)
class Progress:
    """Means over the steps since the last one; a row of the training curves."""

    step: int
    tokens: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Rung:
    """The SAE was scored; the trial waits for the driver to ask for more, or is finished."""

    step: int
    tokens: int
    last: bool
    result: UnlearningResult  # before the last rung perhaps on a part of the questions
    sae: SAE
    forget_rate: Tensor  # (d_sae,) firing rates over the second half of the way to this rung
    retain_rate: Tensor
    groups: Tensor | None  # (d_sae,) group labels of the regularizer, if it has any
    metrics: dict[str, float]
    measured: list[dict[str, Any]]
    """Rows of what was measured on the way to this rung, as plain data."""
    train_seconds: float
    score_seconds: float


class SAERun:
    """The state of one SAE in training; the SAE of a trial, or one of its seeds."""

    def __init__(
        self,
        spec: TrialSpec,
        source: ActivationSource,
        *,
        model_name: str = "",
        hook_name: str = "",
        device: str = "cpu",
        collective: Alone | None = None,
    ) -> None:
        if spec.seeds != 1:
            raise ValueError(
                f"one SAE at a time: the trial has {spec.seeds} seeds, see its members"
            )
        if spec.training.forget_share is not None:
            source = source.with_forget_share(spec.training.forget_share)
        self.spec, self.source = spec, source
        self.collective = collective or Alone()
        self.device = torch.device(device)
        training = spec.training
        spec.regularizer.check(spec.sae.architecture, spec.sae.d_sae, training.steps)
        spec.alpha_schedule.check(training.steps)
        self.sae: TrainingSAE = make_training_sae(
            spec.sae,
            source.d_in,
            seed=spec.seed,
            b_dec=source.mean,
            model_name=model_name,
            hook_name=hook_name,
            device=device,
        )
        self.optimizer = torch.optim.Adam(
            self.sae.parameters(), lr=training.lr, betas=training.adam_betas, fused=True
        )
        self.lr_scheduler = get_lr_scheduler(
            "constant",
            optimizer=self.optimizer,
            training_steps=training.steps,
            lr=training.lr,
            warm_up_steps=int(training.lr_warmup * training.steps),
            decay_steps=int(training.lr_decay * training.steps),
            lr_end=training.lr,
            num_cycles=1,
        )
        self.coefficients = {
            name: CoefficientScheduler(
                warm_up_steps=value.warm_up_steps
                if isinstance(value, TrainCoefficientConfig)
                else 0,
                final_value=value.value if isinstance(value, TrainCoefficientConfig) else value,
            )
            for name, value in self.sae.get_coefficients().items()
        }
        self.regularizer_state = spec.regularizer.init_state(
            source.d_in, spec.sae.d_sae, self.device
        )
        self.firing = FiringRecord.zeros(spec.sae.d_sae, self.device)
        self.stability = GroupStability()
        self.measured: list[dict[str, Any]] = []
        """Rows of what was measured on the way since the last rung, see `train`."""
        self.alpha_factor = 1.0  # of the step before
        self.first_loss: float | None = None
        self._last_good: tuple[int, dict[str, Tensor]] | None = None
        self.under_way: UnderWay | None = None
        """Between two rows of the curve, for who takes the state there; see `train`."""
        self.step = 0
        self.scored_step = 0
        """Step of the last rung that is behind the trial."""
        self.curve: list[Progress] = []
        self.train_seconds = 0.0

    @property
    def tokens(self) -> int:
        """Rows seen so far, over all workers of the trial."""
        return self.step * self.spec.training.batch_size

    @property
    def autocast(self) -> bool:
        """Whether the SAE's own products are in bfloat16."""
        wanted = self.spec.training.autocast
        return wanted == "bfloat16" or (wanted == "auto" and self.device.type == "cuda")

    @property
    def alpha(self) -> float:
        """Weight of the penalty at the last step."""
        return self.spec.alpha * self.alpha_factor

    def next_alpha(self) -> float:
        """Weight of the penalty at the coming step; moves the schedule."""
        schedule = self.spec.alpha_schedule
        overlap = self.firing.overlap() if schedule.measures(self.step) else 0.0
        self.alpha_factor = schedule.factor(
            self.step, self.spec.training.steps, self.alpha_factor, overlap
        )
        return self.alpha

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """This worker's rows of the coming step's batch, and which are forget rows."""
        collective = self.collective
        return self.source.batch(
            self.spec.batches,
            self.step,
            self.spec.training.batch_size,
            collective.rank,
            collective.size,
        )

    def advance(self) -> dict[str, Tensor]:
        """One training step, SAELens' own; returns its losses, unsynchronised."""
        activations, is_forget = self.next_batch()
        with tf32(self.spec.training.tf32):
            output = train_step(
                self.sae,
                self.optimizer,
                activations,
                is_forget,
                step=self.step,
                alpha=self.next_alpha(),
                coefficients={name: c.value for name, c in self.coefficients.items()},
                regularizer=self.spec.regularizer,
                regularizer_state=self.regularizer_state,
                firing=self.firing,
                dead_after=self.spec.training.dead_after,
                grad_clip=self.spec.training.grad_clip,
                collective=self.collective,
                stability=self.stability,
                autocast=self.autocast,
            )
        self.schedules_step()
        return output.losses

    def schedules_step(self) -> None:
        """Learning rate, sparsity coefficients and the step count move on by one."""
        self.lr_scheduler.step()
        for coefficient in self.coefficients.values():
            coefficient.step()
        self.step += 1

    def check_loss(self, loss: float) -> None:
        """Keep the SAE while the loss is sane, and end the trial with it when it no longer is."""
        if self.first_loss is None:
            self.first_loss = loss
        if math.isfinite(loss) and loss <= EXPLODED * max(self.first_loss, 1e-6):
            weights = self.sae.state_dict()
            # The step that computed a sane loss may have left weights that are not.
            if all(bool(torch.isfinite(tensor).all()) for tensor in weights.values()):
                self._last_good = (self.step, {name: w.clone() for name, w in weights.items()})
            return
        sae, step = None, 0
        if self._last_good is not None:
            step, state = self._last_good
            self.sae.load_state_dict(state)
            sae = export_sae(self.sae, self.source.scale)
        raise TrainingDivergedError(
            f"loss is {loss:.6g} at step {self.step} of {self.spec.training.steps}", sae, step
        )

    def export(self) -> SAE:
        """The inference SAE as it is now, in raw activation units."""
        return export_sae(self.sae, self.source.scale)

    def rung(self, sae: SAE, result: UnlearningResult, score_seconds: float) -> Rung:
        """The scored SAE with what was counted on the way to it."""
        forget_rate, retain_rate = self.firing.rates()
        groups = self.regularizer_state.get("groups")
        return Rung(
            step=self.step,
            tokens=self.tokens,
            last=self.step == self.spec.training.steps,
            result=result,
            sae=sae,
            forget_rate=forget_rate.clone(),
            retain_rate=retain_rate.clone(),
            groups=None if groups is None else groups.clone(),
            metrics=dict(self.curve[-1].metrics),
            measured=list(self.measured),
            train_seconds=self.train_seconds,
            score_seconds=score_seconds,
        )

    def add_to_curve(self, means: dict[str, float]) -> Progress:
        """A row of the training curve.

        Args:
            means: of what `advance` returns, over the steps since the last row and all workers.

        Raises:
            TrainingDivergedError: the loss became NaN or infinite, or exploded.
        """
        self.check_loss(means["loss"])
        rows = self.spec.training.batch_size / self.collective.size
        sparsity_terms = [v for name, v in means.items() if name in ("l1_loss", "l0_loss")]
        metrics = {
            "loss": means["loss"],
            "l2_loss": means["mse_loss"],
            "sparsity_loss": sum(sparsity_terms),
            "auxiliary_loss": means.get("auxiliary_reconstruction_loss", 0.0),
            "penalty": means.get("penalty", 0.0),
            "alpha": self.alpha,
            "l0": means["fired"] / rows,
            "explained_variance": 1 - means["squared_error"] / rows / self.source.variance,
            "dead_features": float(
                (self.firing.steps_since_fired > self.spec.training.dead_after).sum()
            ),
            "lr": self.optimizer.param_groups[0]["lr"],
        }
        stability = self.stability.take()
        if stability is not None:
            metrics["group_stability"] = stability
        row = Progress(self.step, self.tokens, metrics)
        self.curve.append(row)
        return row

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the rest of the run, as tensors and plain values.

        At an event of the loop, or where it gives the word between two: elsewhere it holds sums
        for the curve that are not in here.
        """
        last_good = self._last_good
        if last_good is not None and last_good[0] == self.step:
            last_good = (self.step, {})  # the weights as they are
        return {
            "step": self.step,
            "scored_step": self.scored_step,
            "train_seconds": self.train_seconds,
            "measured": list(self.measured),
            "curve": [asdict(row) for row in self.curve],
            "sae": self.sae.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "coefficients": {name: c.state_dict() for name, c in self.coefficients.items()},
            "regularizer": self.regularizer_state,
            "firing": asdict(self.firing),
            "alpha_factor": self.alpha_factor,
            "first_loss": self.first_loss,
            "last_good": last_good,
            "stability": self.stability.state(),
            "under_way": None if self.under_way is None else asdict(self.under_way),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; bit for bit on CPU."""
        self.step, self.alpha_factor = state["step"], state["alpha_factor"]
        self.scored_step, self.train_seconds = state["scored_step"], state["train_seconds"]
        self.measured = list(state["measured"])
        self.curve = [Progress(**row) for row in state["curve"]]
        self.first_loss = state["first_loss"]
        self.sae.load_state_dict(state["sae"])
        self._last_good = state["last_good"]
        if self._last_good is not None and self._last_good[0] == self.step:
            weights = self.sae.state_dict().items()
            self._last_good = (self.step, {name: w.clone() for name, w in weights})
        self.stability.load(state["stability"])
        self.under_way = None if state["under_way"] is None else UnderWay(**state["under_way"])
        # Adam keeps the tensors that it is given.
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        for name, coefficient in self.coefficients.items():
            coefficient.load_state_dict(state["coefficients"][name])
        for name, tensor in state["regularizer"].items():
            self.regularizer_state[name].copy_(tensor)
        for name, tensor in state["firing"].items():
            getattr(self.firing, name).copy_(tensor)
