"""A training step recorded once as a CUDA graph and replayed.

A step of a small SAE is some hundred kernels of a few microseconds each, and asking for them one by
one takes the host longer than it takes the GPU to run them. A CUDA graph asks for all at once.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Step = Callable[..., dict[str, Tensor]]
"""From tensors to tensors by name, (m,) each, and with whatever tensors it writes to in place."""


class Replay:
    """Steps of equal kinds are recorded the second time, and replayed from then on.

    The first of a kind always runs as it is, and so leaves what later ones of its kind find made.
    Numbers reach a recorded step through its arguments and the tensors that it reads only; whatever
    the host decides is part of the kind.
    """

    def __init__(self) -> None:
        self._seen: set[Hashable] = set()
        self._recorded: dict[Hashable, _Recorded] = {}

    def __call__(
        self, kind: Hashable, step: Step, arguments: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """`step(*arguments)`.

        Args:
            kind: of this step; None where it is like no other.
            step: does the same on the device at every step of that kind.
            arguments: of the same shapes at every step of that kind.
        """
        recorded = self._recorded.get(kind)
        if recorded is None:
            if kind is None or kind not in self._seen:
                self._seen.add(kind)
                return step(*arguments)
            recorded = self._recorded[kind] = _record(step, arguments)
        return recorded.replay(arguments)

    def forget(self) -> None:
        """What was recorded holds no longer: shapes may have changed."""
        self._seen.clear()
        self._recorded.clear()


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    arguments: list[Tensor]
    names: list[str]
    values: Tensor  # (names, m)

    def replay(self, arguments: Sequence[Tensor]) -> dict[str, Tensor]:
        torch._foreach_copy_(self.arguments, list(arguments), non_blocking=True)
        self.graph.replay()
        # The next replay writes over them.
        return dict(zip(self.names, self.values.clone().unbind(), strict=True))


def _record(step: Step, arguments: Sequence[Tensor]) -> _Recorded:
    """Nothing runs while it is recorded."""
    own = [argument.clone(memory_format=torch.contiguous_format) for argument in arguments]
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    collects = gc.isenabled()
    gc.disable()  # it may free what a GPU must not free meanwhile
    try:
        # torch.cuda.graph would also give all cached memory back and wait for the GPU, which takes
        # longer than the steps between two updates of groups. Other threads prefetch batches.
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                out = step(*own)
                values = torch.stack(list(out.values()))
            finally:
                graph.capture_end()
    finally:
        if collects:
            gc.enable()
    torch.cuda.current_stream().wait_stream(stream)
    return _Recorded(graph, own, list(out), values)
