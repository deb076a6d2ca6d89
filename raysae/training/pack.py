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
from raysae.training.run import SAERun
from raysae.training.stacked import (
    FORWARD,
    DenseActs,
    Forward,
    Parameters,
    Settings,
    SparseActs,
    on_device,
)
from raysae.training.updates import JointAdam, clip_

FEATURES_ON_CPU, FEATURES_ON_GPU = 16 << 20, 2 << 30
"""Bytes that one product's features (members · n · d_sae, in float32) take at most."""


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
        self._adam = JointAdam(self.runs)
        first = runs[0].spec
        same = (first.batches, first.training.forget_share)
        self._one_batch = all((r.spec.batches, r.spec.training.forget_share) == same for r in runs)

    def advance(self) -> dict[str, Tensor]:
        """One training step of all members; their losses by name, (m,), unsynchronised."""
        shared = self.runs[0].next_batch() if self._one_batch else None
        with tf32(self.runs[0].spec.training.tf32):
            losses = [stack.pull(shared) for stack in self._stacks]
        self._adam.step()
        for run in self.runs:
            run.schedules_step()
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
    cache, or take more of a GPU's memory than a step is worth.
    """
    features = 4 * run.spec.training.batch_size * run.spec.sae.d_sae
    return max(1, (FEATURES_ON_GPU if run.device.type == "cuda" else FEATURES_ON_CPU) // features)


class _Stack:
    """The stacked parameters of some runs."""

    def __init__(self, runs: Sequence[SAERun]) -> None:
        self.runs = list(runs)
        self._forward = FORWARD[runs[0].spec.sae.architecture]
        self._none_dead_before = [0] * len(runs)
        """Step of each member before which no feature can have died."""
        self._stack: Parameters = {}
        for name, _ in runs[0].sae.named_parameters():
            parts = [run.sae.get_parameter(name) for run in runs]
            stack = torch.stack([part.detach() for part in parts])
            for part, view in zip(parts, stack.unbind(), strict=True):
                part.data = view
            self._stack[name] = stack.requires_grad_()

    def pull(self, shared: tuple[Tensor, Tensor] | None) -> dict[str, Tensor]:
        """Losses by name, (m,), and their clipped gradients, on the members' parameters.

        Args:
            shared: batch (n, d_in) and labels (n,) of all members; None: each has its own.
        """
        runs = self.runs
        batch, is_forget = self._batches(shared)
        alphas = on_device([run.next_alpha() for run in runs], batch)
        for stack in self._stack.values():
            stack.grad = None
        settings = [_settings(run, self._dead(i)) for i, run in enumerate(runs)]
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=runs[0].autocast):
            forward = self._forward(self._stack, batch, settings)
        with torch.no_grad():
            fired = forward.acts.fired(is_forget)
        penalties = self._penalties(forward, is_forget, fired)
        losses = dict(forward.losses)
        loss = torch.stack(list(losses.values())).sum(0)
        if penalties is not None:
            loss = loss + alphas * penalties
            losses["penalty"] = penalties
        loss.sum().backward()
        gradients = {name: stack.grad for name, stack in self._stack.items()}
        limits = on_device([run.spec.training.grad_clip for run in runs], batch)
        clip_([g for g in gradients.values() if g is not None], limits)
        for name, gradient in gradients.items():
            assert gradient is not None
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

    def _batches(self, shared: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Every member's batch (m, n, d_in) and labels (m, n)."""
        if shared is not None:
            members = len(self.runs)
            return shared[0].expand(members, -1, -1), shared[1].expand(members, -1)
        batches, labels = zip(*(run.next_batch() for run in self.runs), strict=True)
        return torch.stack(batches), torch.stack(labels)

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

    def _dead(self, i: int) -> Tensor | None:
        """(d_sae,) features of a member that count as dead; None if there are none.

        To know it waits for the device, so it is asked no sooner than one can have died.
        """
        run = self.runs[i]
        if run.step < self._none_dead_before[i]:
            return None
        since, limit = run.firing.steps_since_fired, run.spec.training.dead_after
        left = limit - int(since.max())
        self._none_dead_before[i] = run.step + left + 1
        return since > limit if left < 0 else None

    def _follow_threshold(self, acts: DenseActs | SparseActs) -> None:
        """SAELens' moving average of the smallest activation that was picked (BatchTopK), without
        waiting for the device."""
        if not isinstance(acts, SparseActs) or "topk_threshold" not in dict(
            self.runs[0].sae.named_buffers()
        ):
            return
        of_members = acts.values.split(acts.support.sizes)
        for run, values in zip(self.runs, of_members, strict=True):
            threshold, rate = run.sae.topk_threshold, run.sae.cfg.topk_threshold_lr
            smallest = values.where(values > 0, torch.inf).amin().to(threshold.dtype)
            followed = (1 - rate) * threshold + rate * smallest
            run.sae.topk_threshold = torch.where(smallest.isfinite(), followed, threshold)


def _settings(run: SAERun, dead: Tensor | None) -> Settings:
    spec = run.spec.sae
    coefficients = list(run.coefficients.values())
    return Settings(
        coefficient=coefficients[0].value if coefficients else 0.0,
        k=spec.k or 0,
        dead=dead,
        widths=tuple(getattr(run.sae.cfg, "matryoshka_widths", ())),
        bandwidth=getattr(run.sae.cfg, "jumprelu_bandwidth", 0.0),
    )
