"""What data-parallel workers of one trial say to each other; alone, nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


class LostPeerError(Exception):
    """A trial's workers can no longer talk to each other, most likely because one has ended: this
    process must be started again."""


class Alone:
    """A trial on one worker: every collective is the identity."""

    rank = 0
    size = 1

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over the trial's workers, in place."""
        return tensor

    def mean_gradients_(self, parameters: Iterable[Tensor]) -> None:
        """Average the parameters' gradients over the trial's workers, in place."""

    def broadcast(self, value: object) -> object:
        """The value that rank 0 passed in."""
        return value

    def broadcast_(self, tensor: Tensor) -> None:
        """Rank 0's values, into every rank's tensor."""


class Group(Alone):
    """A trial on several workers, joined by a torch.distributed process group.

    Every call raises `LostPeerError` where another of them has gone.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def sum_(self, tensor: Tensor) -> Tensor:
        with _talking():
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def mean_gradients_(self, parameters: Iterable[Tensor]) -> None:
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        self.sum_(flat).div_(self.size)
        offset = 0
        for grad in grads:
            grad.copy_(flat[offset : offset + grad.numel()].view_as(grad))
            offset += grad.numel()

    def broadcast(self, value: object) -> object:
        box = [value]
        with _talking():
            source = dist.get_global_rank(self.group, 0)
            dist.broadcast_object_list(box, src=source, group=self.group)
        return box[0]

    def broadcast_(self, tensor: Tensor) -> None:
        with _talking():
            dist.broadcast(tensor, src=dist.get_global_rank(self.group, 0), group=self.group)
        # It does not count as a write by itself; what is kept of a tensor as long as it is
        # unchanged (`raysae.regularizers.layout`) would stay.
        torch.autograd.graph.increment_version(tensor)


@contextmanager
def _talking() -> Iterator[None]:
    """What torch raises in here says nothing about the trial."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # of which torch's errors of networks and backends are kinds
        raise LostPeerError(f"another worker of the trial does not answer: {error}") from error
