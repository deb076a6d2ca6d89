"""Several SAEs trained in lock-step, their parameters stacked.

Each member gets what training it alone with SAELens' own step (`train_step`) gives, to rounding:
the loss terms are SAELens' (`raysae.training.stacked`), and optimiser, schedules, regularizer state
and counters stay each member's own, and so are its batches: the order of the batches moves a score
as much as the initial weights (`benchmarks/seed_spread.py`), and a mean over seeds that share it
would not average that out. Where they are the same they are gathered once.

A member's parameters are views of the stack, so whatever reads or saves a member alone needs to
know nothing of its pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

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
    """The stacked parameters of some runs, and the step that they take together."""

    def __init__(self, runs: Sequence[SAERun]) -> None:
        """Stack the parameters; those of the runs become views.

        Raises:
            ValueError: the runs cannot share their steps, see `can_pack`.
        """
        if not can_pack(runs):
            raise ValueError("these SAEs differ in architecture, shape, batch size or position")
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

    def advance(self) -> dict[str, Tensor]:
        """One training step of all members; their losses by name, (m,), unsynchronised."""
        with tf32(self.runs[0].spec.training.tf32):
            return self._advance()

    def _advance(self) -> dict[str, Tensor]:
        runs = self.runs
        batch, is_forget = self._batches()
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
        for i, run in enumerate(runs):
            for name, stack in self._stack.items():
                assert stack.grad is not None
                run.sae.get_parameter(name).grad = stack.grad[i]
            parameters = [p for p in run.sae.parameters() if p.requires_grad]
            torch.nn.utils.clip_grad_norm_(parameters, run.spec.training.grad_clip)
            run.optimizer.step()
            run.schedules_step()
        with torch.no_grad():
            W_dec = self._stack["W_dec"]
            W_dec.div_(W_dec.norm(dim=-1, keepdim=True).clamp_min(1e-8))
            self._follow_threshold(forward.acts)
            losses = {name: value.detach() for name, value in losses.items()}
            losses |= {"loss": loss.detach(), "squared_error": losses["mse_loss"] * batch.shape[1]}
            losses["fired"] = fired.sum((1, 2))
        return losses

    def _batches(self) -> tuple[Tensor, Tensor]:
        """Every member's batch (m, n, d_in) and labels (m, n)."""
        first = self.runs[0].spec
        same = (first.batches, first.training.forget_share)
        if all((r.spec.batches, r.spec.training.forget_share) == same for r in self.runs):
            batch, is_forget = self.runs[0].next_batch()
            members = len(self.runs)
            return batch.expand(members, -1, -1), is_forget.expand(members, -1)
        batches, labels = zip(*(run.next_batch() for run in self.runs), strict=True)
        return torch.stack(batches), torch.stack(labels)

    def _penalties(self, forward: Forward, is_forget: Tensor, fired: Tensor) -> Tensor | None:
        """(m,) penalties after their states have been updated; None if no member has one."""
        tasks = torch.stack([is_forget, ~is_forget], 1).to(fired.dtype).sum(2)
        decoders, errors = self._stack["W_dec"].unbind(), forward.error.unbind()
        penalties: list[Tensor | None] = []
        for i, run in enumerate(self.runs):
            regularizer, state = run.spec.regularizer, run.regularizer_state
            view = StepView(decoders[i], partial(forward.acts.member, i), is_forget[i], errors[i])
            with torch.no_grad():
                seen = view.detach()
                statistics = regularizer.statistics(seen, state, run.step)
                regularizer.update(state, statistics, seen.W_dec, run.step)
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
        n = acts.support.n
        picked = [int((run.spec.sae.k or 0) * n) for run in self.runs]  # entries are by member
        for run, values in zip(self.runs, acts.values.split(picked), strict=True):
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
