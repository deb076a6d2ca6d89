"""A whole trial in a plain loop: train, stop at every rung to be scored, go on or be stopped.

`TrialRun.train` calls back with every row of the curves and every scored rung; whoever drives it (a
test, a script, a worker of the pool) answers whether to go on. The numbers do not depend on who
that is.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from sae_lens import SAE
from sae_lens.saes.sae import TrainCoefficientConfig, TrainingSAE
from sae_lens.training.optim import CoefficientScheduler, get_lr_scheduler
from torch import Tensor

from raysae.training.collective import Alone
from raysae.training.saes import export_sae, make_training_sae
from raysae.training.spec import TrialSpec
from raysae.training.step import FiringRecord, train_step
from raysae.unlearning import UnlearningResult

CURVE_POINTS = 64


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

    def with_forget_share(self, forget_share: float) -> ActivationSource:
        """The same rows, with this share of forget rows in every batch."""
        ...


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
    result: UnlearningResult
    sae: SAE
    forget_rate: Tensor  # (d_sae,) firing rates over the second half of the way to this rung
    retain_rate: Tensor
    groups: Tensor | None  # (d_sae,) group labels of the regularizer, if it has any
    metrics: dict[str, float]
    train_seconds: float
    score_seconds: float


Evaluate = Callable[[SAE, int], UnlearningResult]
OnEvent = Callable[[Progress | Rung], bool]


class TrialRun:
    """The state of one trial in training: SAE, optimiser, schedules, regularizer, counters."""

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
        if spec.training.forget_share is not None:
            source = source.with_forget_share(spec.training.forget_share)
        self.spec, self.source = spec, source
        self.collective = collective or Alone()
        self.device = torch.device(device)
        training = spec.training
        spec.regularizer.check(spec.sae.architecture, spec.sae.d_sae, training.steps)
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
            self.sae.parameters(), lr=training.lr, betas=training.adam_betas
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
        self.alpha_factor = 1.0  # of the step before
        self.first_loss: float | None = None
        self._last_good: tuple[int, dict[str, Tensor]] | None = None
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
    def alpha(self) -> float:
        """Weight of the penalty at the last step."""
        return self.spec.alpha * self.alpha_factor

    def _next_alpha(self) -> float:
        """Weight of the penalty at the coming step; moves the schedule."""
        schedule = self.spec.alpha_schedule
        overlap = self.firing.overlap() if schedule.measures(self.step) else 0.0
        self.alpha_factor = schedule.factor(
            self.step, self.spec.training.steps, self.alpha_factor, overlap
        )
        return self.alpha

    def advance(self) -> dict[str, Tensor]:
        """One training step; returns its losses, unsynchronised."""
        spec, collective = self.spec, self.collective
        batch, is_forget = self.source.batch(
            spec.seed, self.step, spec.training.batch_size, collective.rank, collective.size
        )
        output = train_step(
            self.sae,
            self.optimizer,
            batch,
            is_forget,
            step=self.step,
            alpha=self._next_alpha(),
            coefficients={name: c.value for name, c in self.coefficients.items()},
            regularizer=spec.regularizer,
            regularizer_state=self.regularizer_state,
            firing=self.firing,
            dead_after=spec.training.dead_after,
            grad_clip=spec.training.grad_clip,
            collective=collective,
        )
        self.lr_scheduler.step()
        for coefficient in self.coefficients.values():
            coefficient.step()
        self.step += 1
        return output.losses

    def train(
        self,
        evaluate: Evaluate,
        on_event: OnEvent,
        before_scoring: Callable[[], object] = lambda: None,
    ) -> None:
        """Train to the end, or until told to stop.

        Args:
            evaluate: (SAE in raw units, training steps so far) → its unlearning result.
            on_event: told of every row of the curves and every rung; False ends the trial. Both are
                called on rank 0 of a data-parallel trial only, whose word is passed on.
            before_scoring: called before `evaluate`, on rank 0; its time counts neither as training
                nor as scoring.

        Raises:
            TrainingDivergedError: the loss became NaN or infinite, or exploded.
        """
        spec = self.spec
        total, batch_size = spec.training.steps, spec.training.batch_size
        rung_steps = [math.ceil(tokens / batch_size) for tokens in spec.rungs]
        # Rates belong to the SAE as it is scored, not to what it was at the beginning.
        rates_start = {(a + b) // 2 for a, b in pairwise([0, *rung_steps])}
        log_every = max(1, total // CURVE_POINTS)
        started = time.perf_counter()
        sums: dict[str, Tensor] = {}
        since = 0
        while True:
            # First, because a trial may have been taken up again between training and scoring.
            if self.step in rung_steps and self.scored_step < self.step:
                self._stop_clock(started)
                rung = None
                if self.collective.rank == 0:
                    before_scoring()
                    rung = self._score(evaluate)
                if not self._tell(on_event, rung):
                    return
                self.scored_step = self.step
                started = time.perf_counter()
            if self.step == total:
                return
            for name, value in self.advance().items():
                sums[name] = sums[name] + value if name in sums else value
            since += 1
            if self.step in rates_start:
                self.firing.reset_rates()
            if self.step in rung_steps or self.step % log_every == 0:
                metrics = self._metrics(sums, since)
                sums, since = {}, 0
                self._check_loss(metrics["loss"])
                row = Progress(self.step, self.tokens, metrics)
                self.curve.append(row)
                started = self._stop_clock(started)
                if not self._tell(on_event, row):
                    return

    def _stop_clock(self, started: float) -> float:
        """Count the time since `started` as training; the time now."""
        now = time.perf_counter()
        self.train_seconds += now - started
        return now

    def _check_loss(self, loss: float) -> None:
        """Keep the SAE while the loss is sane, and end the trial with it when it no longer is."""
        if self.first_loss is None:
            self.first_loss = loss
        if math.isfinite(loss) and loss <= EXPLODED * max(self.first_loss, 1e-6):
            weights = self.sae.state_dict()
            # The step that computed a sane loss may have left weights that are not.
            if all(bool(torch.isfinite(tensor).all()) for tensor in weights.values()):
                self._last_good = (self.step, copy.deepcopy(weights))
            return
        sae, step = None, 0
        if self._last_good is not None:
            step, state = self._last_good
            self.sae.load_state_dict(state)
            sae = export_sae(self.sae, self.source.scale)
        raise TrainingDivergedError(
            f"loss is {loss:.6g} at step {self.step} of {self.spec.training.steps}", sae, step
        )

    def _tell(self, on_event: OnEvent, event: Progress | Rung | None) -> bool:
        """Rank 0's answer to the event, on every rank."""
        answer = on_event(event) if self.collective.rank == 0 and event is not None else True
        return bool(self.collective.broadcast(answer)) if self.collective.size > 1 else answer

    def _score(self, evaluate: Evaluate) -> Rung:
        started = time.perf_counter()
        sae = export_sae(self.sae, self.source.scale)
        result = evaluate(sae, self.step)
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
            train_seconds=self.train_seconds,
            score_seconds=time.perf_counter() - started,
        )

    def _metrics(self, sums: dict[str, Tensor], steps: int) -> dict[str, float]:
        """Means over `steps` steps, averaged over the trial's workers; the only synchronisation."""
        names = sorted(sums)
        values = torch.stack([sums[name].float() for name in names]) / steps
        values = self.collective.sum_(values) / self.collective.size
        means = dict(zip(names, values.tolist(), strict=True))
        rows = self.spec.training.batch_size / self.collective.size
        sparsity_terms = [v for name, v in means.items() if name in ("l1_loss", "l0_loss")]
        return {
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

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the rest of the run, as tensors and plain values.

        Of a run in `train`, at an event: between two of them, sums for the curve are under way.
        """
        return {
            "step": self.step,
            "scored_step": self.scored_step,
            "train_seconds": self.train_seconds,
            "curve": [asdict(row) for row in self.curve],
            "sae": self.sae.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "coefficients": {name: c.state_dict() for name, c in self.coefficients.items()},
            "regularizer": self.regularizer_state,
            "firing": asdict(self.firing),
            "alpha_factor": self.alpha_factor,
            "first_loss": self.first_loss,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; bit for bit on CPU."""
        self.step, self.alpha_factor = state["step"], state["alpha_factor"]
        self.scored_step, self.train_seconds = state["scored_step"], state["train_seconds"]
        self.curve = [Progress(**row) for row in state["curve"]]
        self.first_loss = state["first_loss"]
        self.sae.load_state_dict(state["sae"])
        if self.curve and self.curve[-1].step == self.step:
            self._last_good = (self.step, copy.deepcopy(self.sae.state_dict()))
        # Adam keeps the tensors that it is given.
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        for name, coefficient in self.coefficients.items():
            coefficient.load_state_dict(state["coefficients"][name])
        for name, tensor in state["regularizer"].items():
            self.regularizer_state[name].copy_(tensor)
        for name, tensor in state["firing"].items():
            getattr(self.firing, name).copy_(tensor)
