"""Several SAEs trained in lock-step, their parameters stacked, as many as a product gains by.

Each member gets what training it alone with SAELens' own step (`train_step`) gives, to rounding:
the loss terms are SAELens' (`raysae.training.stacked`), and optimiser, schedules, regularizer state
and counters stay each member's own, and so are its batches: the order of the batches moves a score
as much as the initial weights (`benchmarks/seed_spread.py`), and a mean over seeds that share it
would not average that out. Where they are the same they are gathered once.

A member's parameters are views of the stack, so whatever reads or saves a member alone needs to
know nothing of its pack.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from raysae.regularizers import StepView
from raysae.training.precision import tf32
from raysae.training.replay import Replay
from raysae.training.run import SAERun
from raysae.training.stacked import (
    FORWARD,
    PICKING,
    SPARSITY_TERMS,
    DenseActs,
    Forward,
    Parameters,
    Settings,
    SparseActs,
)
from raysae.training.updates import JointAdam, clip_

FEATURES_ON_CPU, FEATURES_ON_GPU = 16 << 20, 2 << 30
"""Bytes that one product's features (members · n · d_sae, in float32) take at most."""

LOOK_AHEAD_ON_GPU = 63
"""Steps after one that looked for dead features in which a GPU is not waited for to look again."""


def can_pack(runs: Sequence[SAERun]) -> bool:
    """Whether runs may share their steps: architecture, shapes, kind of step, position agree."""
    return len({_common(run) for run in runs}) == 1


def _common(run: SAERun) -> tuple[object, ...]:
    spec = run.spec
    shapes = (spec.sae.architecture, spec.sae.d_sae, spec.sae.matryoshka_widths)
    training = spec.training
    common = (training.batch_size, training.step, run.autocast, training.tf32, run.step)
    return (*shapes, *common)


class Pack:
    """The runs in stacks, and the step that they take together."""

    def __init__(self, runs: Sequence[SAERun]) -> None:
        """Stack the parameters; those of the runs become views.

        Raises:
            ValueError: the runs cannot share their steps, see `can_pack`.
        """
        if not can_pack(runs):
            raise ValueError("these SAEs differ in architecture, shape, batch size or position")
        self.runs = list(runs)
        stacks = math.ceil(len(runs) / _members_at_once(runs[0]))
        bounds = [len(runs) * i // stacks for i in range(stacks + 1)]
        self._stacks = [_Stack(self.runs[low:high]) for low, high in pairwise(bounds)]
        self._adam, self._replay = JointAdam(self.runs), Replay()
        first = runs[0].spec
        same = (first.batches, first.training.forget_share)
        self._one_batch = all((r.spec.batches, r.spec.training.forget_share) == same for r in runs)

    def advance(self) -> dict[str, Tensor]:
        """One training step of all members; their losses by name, (m,), unsynchronised."""
        runs = self.runs
        batches = self._batches()
        numbers = (
            [run.next_alpha() for run in runs],
            [_coefficient(run) for run in runs],
            self._adam.rates,
        )
        for stack in self._stacks:
            stack.look_for_dead()
        with tf32(runs[0].spec.training.tf32):
            if runs[0].device.type == "cuda":
                losses = self._on_gpu(numbers, batches)
            else:
                alphas, coefficients, rates = numbers
                rows, _ = batches
                losses = self._step(
                    rows.new_tensor(alphas), rows.new_tensor(coefficients), rates, *batches
                )
        for run in runs:
            run.schedules_step()
        return losses

    def _batches(self) -> tuple[Tensor, Tensor]:
        """Batches and labels of this step: all members' (n, d_in) and (n,), or each one's own
        (m, n, d_in) and (m, n), gathered together."""
        first, collective = self.runs[0], self.runs[0].collective
        if self._one_batch:
            return first.next_batch()
        if all(run.source is first.source for run in self.runs):
            return first.source.batches(
                [run.spec.batches for run in self.runs],
                first.step,
                first.spec.training.batch_size,
                collective.rank,
                collective.size,
            )
        batches, labels = zip(*(run.next_batch() for run in self.runs), strict=True)
        return torch.stack(batches), torch.stack(labels)

    def _on_gpu(
        self, numbers: tuple[list[float], ...], batches: tuple[Tensor, Tensor]
    ) -> dict[str, Tensor]:
        """The step, recorded where it can be."""
        arguments = [*_on_device(numbers, batches[0].device), *batches]
        kinds = tuple(run.spec.regularizer.kind(run.step) for run in self.runs)
        if None in kinds:
            self._replay.forget()
            return self._step(*arguments)
        places = tuple(stack.places for stack in self._stacks)
        return self._replay((kinds, places), self._step, arguments)

    def _step(
        self,
        alphas: Tensor,
        coefficients: Tensor,
        rates: Sequence[float] | Tensor,
        batch: Tensor,
        is_forget: Tensor,
    ) -> dict[str, Tensor]:
        """What the device does in a step."""
        if batch.ndim == 2:
            batch, is_forget = (x.expand(len(self.runs), *x.shape) for x in (batch, is_forget))
        losses, start = [], 0
        for stack in self._stacks:
            of_stack = slice(start, start + len(stack.runs))
            of_members = (alphas[of_stack], coefficients[of_stack])
            numbers = (x.to(batch.dtype) for x in of_members)
            losses.append(stack.pull(batch[of_stack], is_forget[of_stack], *numbers))
            start = of_stack.stop
        self._adam.step(rates)
        for stack in self._stacks:
            stack.normalise()
        names = dict.fromkeys(name for found in losses for name in found)
        none = torch.zeros_like
        return {
            name: torch.cat([found.get(name, none(found["loss"])) for found in losses])
            for name in names
        }


def _members_at_once(run: SAERun) -> int:
    """How many go through a step's products together.

    Each more saves what is around the products, until their features no longer fit a processor's
    cache, or take more of a GPU's memory than a step is worth. On a CPU an SAE must not depend on
    who is beside it, in the last digit either, as training follows from that digit: dense products
    and sums over several members round otherwise, and gain little there; sums over what an
    architecture has picked are those of each alone.
    """
    on_gpu = run.device.type == "cuda"
    if not on_gpu and run.spec.sae.architecture not in PICKING:
        return 1
    features = 4 * run.spec.training.batch_size * run.spec.sae.d_sae
    return max(1, (FEATURES_ON_GPU if on_gpu else FEATURES_ON_CPU) // features)


class _Stack:
    """The stacked parameters of some runs."""

    def __init__(self, runs: Sequence[SAERun]) -> None:
        self.runs = list(runs)
        self._forward = FORWARD[runs[0].spec.sae.architecture]
        self.places = (0,) * len(runs)
        """For each member's dead features in a step; at least as many as there are."""
        self._enough = [0] * len(runs)
        """Places that each member needs before the step of its next look."""
        self._next_look = [0] * len(runs)
        self._look_ahead = LOOK_AHEAD_ON_GPU if runs[0].device.type == "cuda" else 0
        self._stack: Parameters = {}
        for name, _ in runs[0].sae.named_parameters():
            parts = [run.sae.get_parameter(name) for run in runs]
            stack = torch.stack([part.detach() for part in parts])
            for part, view in zip(parts, stack.unbind(), strict=True):
                part.data = view
            self._stack[name] = stack.requires_grad_()
        self._limits = stack.new_tensor([run.spec.training.grad_clip for run in runs])

    def look_for_dead(self) -> None:
        """See to it that there are places enough at this step."""
        if self.runs[0].spec.sae.architecture in PICKING:
            places = [self._places_of(i) for i in range(len(self.runs))]
            if self._look_ahead:  # as many for all: few kinds of step
                places = [max(places)] * len(places)
            self.places = tuple(places)

    def pull(
        self, batch: Tensor, is_forget: Tensor, alphas: Tensor, coefficients: Tensor
    ) -> dict[str, Tensor]:
        """Losses by name, (m,), and their clipped gradients, on the members' parameters.

        Args:
            batch, is_forget: (m, n, d_in) and (m, n).
            alphas, coefficients: of the penalty and of the sparsity term, (m,).
        """
        runs = self.runs
        settings = [_settings(run, n) for run, n in zip(runs, self.places, strict=True)]
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=runs[0].autocast):
            forward = self._forward(self._stack, batch, settings)
        with torch.no_grad():
            fired = forward.acts.fired(is_forget)
        penalties = self._penalties(forward, is_forget, fired)
        losses = {
            name: coefficients * value if name in SPARSITY_TERMS else value
            for name, value in forward.losses.items()
        }
        loss = torch.stack(list(losses.values())).sum(0)
        if penalties is not None:
            loss = loss + alphas * penalties
            losses["penalty"] = penalties
        gradients = [
            gradient.contiguous()  # as the parameters are, which a fused optimiser relies on
            for gradient in torch.autograd.grad(loss.sum(), list(self._stack.values()))
        ]
        clip_(gradients, self._limits)
        for name, gradient in zip(self._stack, gradients, strict=True):
            for run, of_run in zip(runs, gradient.unbind(), strict=True):
                run.sae.get_parameter(name).grad = of_run
        with torch.no_grad():
            self._follow_threshold(forward.acts)
            losses = {name: value.detach() for name, value in losses.items()}
            losses |= {"loss": loss.detach(), "squared_error": losses["mse_loss"] * batch.shape[1]}
            losses["fired"] = fired.sum((1, 2))
        return losses

    @torch.no_grad()
    def normalise(self) -> None:
        """Decoder rows of unit norm again, after the optimiser's step."""
        W_dec = self._stack["W_dec"]
        W_dec.div_(W_dec.norm(dim=-1, keepdim=True).clamp_min(1e-8))

    def _penalties(self, forward: Forward, is_forget: Tensor, fired: Tensor) -> Tensor | None:
        """(m,) penalties after their states have been updated; None if no member has one."""
        tasks = torch.stack([is_forget, ~is_forget], 1).to(fired.dtype).sum(2)
        decoders, errors = self._stack["W_dec"].unbind(), forward.error.unbind()
        acts = forward.acts.members()
        penalties: list[Tensor | None] = []
        for i, run in enumerate(self.runs):
            regularizer, state = run.spec.regularizer, run.regularizer_state
            view = StepView(decoders[i], acts[i], is_forget[i], errors[i])
            with torch.no_grad():
                seen = view.detach()
                statistics = regularizer.statistics(seen, state, run.step)
                run.stability.update(regularizer, state, statistics, seen.W_dec, run.step)
                run.firing.add(fired[i], tasks[i])
            uses = regularizer.uses_alpha
            penalties.append(regularizer.penalty(view, state) if uses else None)
        if all(penalty is None for penalty in penalties):
            return None
        zero = fired.new_zeros(())
        return torch.stack([zero if penalty is None else penalty for penalty in penalties])

    def _places_of(self, i: int) -> int:
        """For a member's dead features at this step.

        To know how many there are it waits for the device. On a GPU it asks seldom, for those that
        can have died when it asks again, and rounds up: a step with other places is another step.
        """
        run, ahead = self.runs[i], self._look_ahead
        if run.step >= self._next_look[i]:
            since, limit = run.firing.steps_since_fired, run.spec.training.dead_after
            left = limit - int(since.max())
            self._next_look[i] = run.step + max(left, ahead) + 1
            dead = int((since + ahead > limit).sum()) if left < ahead else 0
            if dead and ahead:
                dead = min(1 << (dead - 1).bit_length(), len(since))
            self._enough[i] = dead
        return self._enough[i]

    def _follow_threshold(self, acts: DenseActs | SparseActs) -> None:
        """SAELens' moving average of the smallest activation that was picked (BatchTopK), without
        waiting for the device."""
        if not isinstance(acts, SparseActs) or "topk_threshold" not in dict(
            self.runs[0].sae.named_buffers()
        ):
            return
        positive = acts.values.where(acts.values > 0, torch.inf)
        of_members = positive.split(acts.support.sizes)
        for run, values in zip(self.runs, of_members, strict=True):
            threshold, rate = run.sae.topk_threshold, run.sae.cfg.topk_threshold_lr
            smallest = values.amin().to(threshold.dtype)
            followed = (1 - rate) * threshold + rate * smallest
            threshold.copy_(torch.where(smallest.isfinite(), followed, threshold))


def _coefficient(run: SAERun) -> float:
    """Of the sparsity term at this step; 0 where the architecture has none."""
    coefficients = list(run.coefficients.values())
    return float(coefficients[0].value) if coefficients else 0.0


def _on_device(numbers: Sequence[list[float]], device: torch.device) -> list[Tensor]:
    """Each list as float32 on a GPU, in one copy that is not waited for."""
    flat = torch.tensor([x for of_one in numbers for x in of_one], pin_memory=True)
    sent = flat.to(device, non_blocking=True)
    return list(torch.split(sent, [len(of_one) for of_one in numbers]))


def _settings(run: SAERun, places: int) -> Settings:
    """
    Args:
        places: for its dead features, at least as many.
    """
    spec, dead = run.spec.sae, None
    if places:
        is_dead = run.firing.steps_since_fired > run.spec.training.dead_after
        dead = torch.nonzero_static(is_dead, size=places, fill_value=-1)[:, 0]
    return Settings(
        k=spec.k or 0,
        dead=dead,
        widths=tuple(getattr(run.sae.cfg, "matryoshka_widths", ())),
        bandwidth=getattr(run.sae.cfg, "jumprelu_bandwidth", 0.0),
    )
