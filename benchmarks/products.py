"""Bare products in float32 on a CPU, by either library that PyTorch brings.

    python benchmarks/products.py [--threads 1] [--repeats 30]

For the products of a training step (x: rows of activations, h: of features, E and D: encoder and
decoder): Gflop/s of MKL and of oneDNN, the ratio, and how far both are from float64, in units of
float32's rounding at the largest entry. Then, for the sizes of the embedded world's layers, Gflop/s
of a weight as it is and of one that is in oneDNN's order already (`FixedWeight`). Least time of
`--repeats`, what is compared in turns. A line says which library raysae takes on this machine.
"""

from __future__ import annotations

import argparse
import platform
import time

import torch
from torch import Tensor

from raysae import products

SIZES = ((1024, 128, 512), (1024, 512, 4096), (256, 2304, 16384))
LAYERS = ((1027, 128, 384), (1027, 384, 128), (1027, 128, 128), (1014, 128, 384), (520, 128, 384))
"""rows, d_in, d_out"""
LIBRARIES: tuple[products.Library, ...] = ("mkl", "onednn")


def operands(rows: int, d_in: int, d_sae: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The products of a dense step, as they are asked for."""
    generator = torch.Generator().manual_seed(0)
    x, h = (torch.randn(rows, d, generator=generator) for d in (d_in, d_sae))
    E, D = (torch.randn(d_in, d_sae, generator=generator) for _ in range(2))
    D = D.T.contiguous()
    return {"x E": (x, E), "h D": (h, D), "x Dᵀ": (x, D.T), "xᵀ h": (x.T, h), "hᵀ x": (h.T, x)}


def least_seconds(left: Tensor, right: Tensor, repeats: int) -> dict[str, float]:
    """By library."""
    least = dict.fromkeys(LIBRARIES, float("inf"))
    for turn in range(repeats + 2):
        for name in LIBRARIES:
            with products.made_by(name):
                started = time.perf_counter()
                products.matmul(left, right)
                if turn >= 2:  # the first are slower
                    least[name] = min(least[name], time.perf_counter() - started)
    return {str(name): seconds for name, seconds in least.items()}


def least_seconds_of_a_layer(rows: int, d_in: int, d_out: int, repeats: int) -> tuple[float, float]:
    """By oneDNN, of a weight as it is and of a fixed one, whose products are the same bits."""
    x, weight = torch.randn(rows, d_in), torch.randn(d_out, d_in)
    with products.made_by("onednn"):
        fixed = products.FixedWeight(weight)
        ways = (lambda: products.linear(x, weight), lambda: fixed.linear(x))
        assert torch.equal(ways[0](), ways[1]())
        least = [float("inf")] * 2
        for _ in range(repeats):
            for i, way in enumerate(ways):
                started = time.perf_counter()
                way()
                least[i] = min(least[i], time.perf_counter() - started)
    return least[0], least[1]


def errors(left: Tensor, right: Tensor) -> list[float]:
    """By library, the largest error in units of rounding at the largest entry."""
    exact = left.double() @ right.double()
    unit = float(exact.abs().max()) * torch.finfo(torch.float32).eps
    found = []
    for name in LIBRARIES:
        with products.made_by(name):
            found.append(float((products.matmul(left, right) - exact).abs().max()) / unit)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    capability = torch.backends.cpu.get_cpu_capability()
    machine = f"{platform.machine()}, {capability}"
    print(f"torch {torch.__version__}, {machine}, {arguments.threads} thread(s)")
    print(f"raysae takes {products.library()} here\n")
    print("rows, d_in, d_sae    product   mkl  onednn  ratio   errors")
    for size in SIZES:
        work = 2 * size[0] * size[1] * size[2]
        for name, (left, right) in operands(*size).items():
            mkl, onednn = least_seconds(left, right, arguments.repeats).values()
            off = " ".join(f"{error:5.1f}" for error in errors(left, right))
            print(
                f"{size!s:20} {name:8} {work / mkl / 1e9:5.0f}  {work / onednn / 1e9:6.0f}  "
                f"{mkl / onednn:5.2f}   {off}",
                flush=True,
            )
    print("\nrows, d_in, d_out    as it is  fixed  ratio")
    for size in LAYERS:
        work = 2 * size[0] * size[1] * size[2]
        as_it_is, fixed = least_seconds_of_a_layer(*size, arguments.repeats)
        print(
            f"{size!s:20} {work / as_it_is / 1e9:8.0f}  {work / fixed / 1e9:5.0f}  "
            f"{as_it_is / fixed:5.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
