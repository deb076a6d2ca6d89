"""Clipping and Adam for several SAEs at once: what each would do alone, in fewer calls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raysae.training.run import SAERun


def clip_(gradients: Sequence[Tensor], limits: Tensor) -> None:
    """`torch.nn.utils.clip_grad_norm_` of every member of a stack, in place.

    Args:
        gradients: of each parameter, (m, …).
        limits: (m,) the largest norm of a member's gradients together.
    """
    norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients])
    factors = (limits / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)
    if factors.is_cpu and bool((factors == 1).all()):
        return
    for gradient in gradients:
        gradient.mul_(factors.view(-1, *[1] * (gradient.ndim - 1)))


class JointAdam:
    """One fused call for all runs whose learning rates agree.

    Moments and step counts lie in the runs' own optimisers, which save and restore them.
    """

    def __init__(self, runs: Sequence[SAERun]) -> None:
        alike: dict[tuple[object, ...], list[SAERun]] = {}
        for run in runs:
            t = run.spec.training
            same = (t.lr, t.lr_warmup, t.lr_decay, t.steps, t.adam_betas)
            alike.setdefault(same, []).append(run)
            # There are no gradients, so that nothing moves; a learning rate's schedule warns where
            # its optimiser has never been called.
            run.optimizer.zero_grad()
            run.optimizer.step()
        self._alike = list(alike.values())
        self._adam = torch.optim.Adam(
            [
                {
                    "params": [p for run in group for p in _parameters(run)],
                    "betas": group[0].spec.training.adam_betas,
                }
                for group in self._alike
            ],
            fused=True,
            capturable=runs[0].device.type == "cuda",
        )

    @property
    def rates(self) -> list[float]:
        """Learning rate of each group of runs, by their schedules."""
        return [float(runs[0].optimizer.param_groups[0]["lr"]) for runs in self._alike]

    def step(self, rates: Sequence[float] | Tensor) -> None:
        """Move the parameters of all runs by their gradients.

        Args:
            rates: one a group, see `rates`; may lie on the device.
        """
        for group, rate, runs in zip(self._adam.param_groups, rates, self._alike, strict=True):
            group["lr"] = rate
            for run in runs:
                for parameter in _parameters(run):
                    self._adam.state[parameter] = run.optimizer.state[parameter]
        self._adam.step()


def _parameters(run: SAERun) -> list[Tensor]:
    parameters: list[Tensor] = run.optimizer.param_groups[0]["params"]
    return parameters
