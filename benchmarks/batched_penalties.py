"""What batching a penalty over the members of a pack would gain: one by one against stacked.

    python benchmarks/batched_penalties.py [--sizes small medium large] [--members 3]
        [--threads 1] [--device cpu|cuda]

A pack computes the penalties of its members one after the other, by the same code as for one SAE.
Here that is compared with the same penalty of all decoders at once, a batched Gram matrix with the
same gradient of its own, for the two methods whose penalty is one Gram matrix: `fixed_orthogonal`
and `importance`. Value and gradient, in turns in one process; median of the turns. Both must agree.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from raysae.regularizers.gram import mean_squared_cosine, unit_rows, weighted_mean_squared_cosine

SIZES = {"small": (128, 512), "medium": (512, 4096), "large": (2304, 16384)}


class BatchedSquaredGram(torch.autograd.Function):
    """‖UᵀU‖²_F of each of U (m, n, d_in), n > d_in; (m,)."""

    @staticmethod
    def forward(ctx: Any, U: Tensor) -> Tensor:
        gram = U.mT @ U
        ctx.save_for_backward(U, gram)
        return gram.pow(2).sum((1, 2))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        U, gram = ctx.saved_tensors
        product: Tensor = U @ gram
        return product.mul_(4 * grads[0][:, None, None])


def batched(W: Tensor, weights: Tensor) -> Tensor:
    """(m,) weighted mean squared cosines of W (m, n, d_in) with weights (m, n)."""
    _, n, d_in = W.shape
    U = unit_rows(W) * weights.sqrt()[..., None]
    total = BatchedSquaredGram.apply(U) - weights.pow(2).sum(1)
    return total * (d_in / (n * (n - 1)))


def looped(W: Tensor, weights: Tensor | None) -> Tensor:
    """The same with the regularizers' own functions, a member at a time."""
    if weights is None:
        return torch.stack([mean_squared_cosine(unit_rows(one)) for one in W.unbind()])
    pairs = zip(W.unbind(), weights, strict=True)
    return torch.stack([weighted_mean_squared_cosine(unit_rows(one), w) for one, w in pairs])


def timed(penalty: Callable[[], Tensor], W: Tensor) -> tuple[float, Tensor, Tensor]:
    """Milliseconds, values and gradient."""
    W.grad = None
    _wait(W)
    started = time.perf_counter()
    values = penalty()
    values.sum().backward()
    _wait(W)
    assert W.grad is not None
    return 1e3 * (time.perf_counter() - started), values.detach(), W.grad


def _wait(W: Tensor) -> None:
    if W.is_cuda:
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small", "medium"])
    parser.add_argument("--members", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"{platform.machine()}, torch {version('torch')}, {options.threads} thread(s), "
        f"{options.device}, {options.members} members, load average {os.getloadavg()[0]:.0f}"
    )
    print("| d_in → d_sae | method | one by one, ms | batched, ms | ratio |")
    print("| --- | --- | --- | --- | --- |")
    for d_in, d_sae in map(SIZES.__getitem__, options.sizes):
        generator = torch.Generator().manual_seed(0)
        W = torch.randn(options.members, d_sae, d_in, generator=generator)
        W = W.to(options.device).requires_grad_()
        weights = torch.rand(options.members, d_sae, generator=generator).to(options.device)
        ones = torch.ones_like(weights)
        for name, w in (("fixed_orthogonal", None), ("importance", weights)):
            sides = (
                lambda w=w, W=W: looped(W, w),
                lambda w=w, W=W, ones=ones: batched(W, ones if w is None else w),
            )
            taken: tuple[list[float], list[float]] = ([], [])
            for _ in range(options.turns + 1):
                found = [timed(side, W) for side in sides]
                for one, (milliseconds, _, _) in zip(taken, found, strict=True):
                    one.append(milliseconds)
            torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-3, atol=1e-6)
            loop, batch = (statistics.median(one[1:]) for one in taken)
            print(f"| {d_in} → {d_sae} | {name} | {loop:.2f} | {batch:.2f} | {loop / batch:.2f} |")


if __name__ == "__main__":
    main()
