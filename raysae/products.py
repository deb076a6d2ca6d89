"""Matrix products in float32 on a CPU by the faster of two libraries of PyTorch's.

PyTorch asks MKL, which keeps to AVX2 on AMD's processors: half of what one with AVX-512 can do. The
other library is oneDNN, which generates its code for the processor that it finds; PyTorch uses it
for shorter types and in compiled models. On other processors, on GPUs and for other types these are
PyTorch's own products. Which library it is follows from the processor and the shapes, so that a run
that is repeated or resumed on a machine rounds as it did.

`benchmarks/products.py` measures both.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

Library = Literal["mkl", "onednn"]

LEAST_WORK = 1 << 20
"""Multiply-adds below which asking oneDNN, 10 µs, takes longer than what it saves."""
LEAST_ROWS = 8
"""Rows and columns of a product below which it is bound by memory, and oneDNN slower."""
PART = 512
"""Of a long inner axis; see `_product_of_two`. Of (2304, 16384) · (16384, 2304), the left one
transposed, 209 Gflop/s rather than 143."""

CPU_INFO = Path("/proc/cpuinfo")
"""Where Linux describes the processor."""

_GELU = 2 * math.sqrt(2 / math.pi)
_ARGUMENTS = ["X", "W", "B", "attr", "scalars", "algorithm"]
_library: Library | None = None


def library() -> Library:
    """By which products of some size are made on this machine."""
    global _library
    if _library is None:
        _library = "onednn" if _is_amd_with_avx512() and _has_onednn() else "mkl"
    return _library


@contextmanager
def made_by(name: Library) -> Iterator[None]:
    """Inside, products are made by that library; for comparisons.

    Raises:
        RuntimeError: this PyTorch has no oneDNN.
    """
    global _library
    if name == "onednn" and not _has_onednn():
        raise RuntimeError("this PyTorch was built without oneDNN's linear layer")
    before, _library = _library, name
    try:
        yield
    finally:
        _library = before


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """left · right, differentiable.

    Of (…, m, k) and (k, n), or of stacks (s, m, k) and (s, k, n): the members of one round as each
    does alone where oneDNN makes them.
    """
    if not _by_onednn(left, right):
        return left @ right
    if torch.is_grad_enabled() and (left.requires_grad or right.requires_grad):
        product: Tensor = _Product.apply(left, right)
        return product
    return _product(left, right)


def affine(bias: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """bias + left · right, of stacks (s, n), (s, m, k) and (s, k, n), without gradient."""
    if not _by_onednn(left, right):
        return torch.baddbmm(bias[:, None], left, right)
    members = zip(left, right, bias, strict=True)
    return _stacked([_onednn(x, W.T, b) for x, W, b in members])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias, of (…, d_in), (d_out, d_in) and (d_out,), differentiable."""
    needs_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias)
    )
    if needs_grad or not _by_onednn(x, weight.T):
        return F.linear(x, weight, bias)
    return _onednn(x, weight, bias)


class FixedWeight:
    """(d_out, d_in) of a linear layer that is asked many times and not changed; without gradients.

    oneDNN brings a weight into an order of its own before it multiplies, 5 to 11 % of the time of a
    product of 500 to 1000 rows (`benchmarks/products.py`); here that is done once, and only the
    ordered weight is kept. The products are the same bits. Which library it is is decided when the
    weight is given.
    """

    def __init__(self, weight: Tensor) -> None:
        self._by_onednn = (
            library() == "onednn"
            and weight.is_cpu
            and weight.dtype == torch.float32
            and min(weight.shape) >= LEAST_ROWS
        )
        weight = weight.detach().contiguous()
        self._weight: Tensor = (
            torch.ops.mkldnn._reorder_linear_weight(weight) if self._by_onednn else weight
        )

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x · weightᵀ + bias, of (…, d_in) and (d_out,)."""
        if self._by_onednn:
            return _onednn(x, self._weight, bias)
        return F.linear(x, self._weight, bias)

    def gelu(self, x: Tensor) -> Tensor:
        """GELU, in its tanh approximation, of x · weightᵀ."""
        if self._by_onednn:
            return _onednn(x, self._weight, None, "gelu", "tanh")
        y = F.linear(x, self._weight)
        if not y.is_cpu:
            return F.gelu(y, approximate="tanh")
        # y·σ(2√(2/π)·(y + 0.044715·y³)) is the same, and σ takes a third of the time of tanh.
        argument = torch.add(y.new_tensor(_GELU), y * y, alpha=0.044715 * _GELU).mul_(y)
        return argument.sigmoid_().mul_(y)

    def times(self, x: Tensor, factor: Tensor) -> Tensor:
        """x · weightᵀ, times `factor` of that shape entry by entry."""
        if self._by_onednn:
            found: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
                x, factor, self._weight, None, "mul"
            )
            return found
        return F.linear(x, self._weight).mul_(factor)


class preferred(TorchFunctionMode):  # noqa: N801 - a context manager
    """Inside, products that other libraries' modules ask PyTorch for are made here."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _MATMULS and not kwargs:
            return matmul(*args)
        if func is F.linear:
            return linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


_MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        return _product(left, right)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (left, right) = grads, ctx.saved_tensors
        of_left, of_right = ctx.needs_input_grad
        grad_right = None
        if of_right and right.ndim == 2:
            grad_right = matmul(left.flatten(0, -2).T, grad.flatten(0, -2))
        elif of_right:
            grad_right = matmul(left.mT, grad)
        return matmul(grad, right.mT) if of_left else None, grad_right


def _product(left: Tensor, right: Tensor) -> Tensor:
    if right.ndim == 2:
        return _product_of_two(left, right)
    return _stacked([_product_of_two(a, b) for a, b in zip(left, right, strict=True)])


def _product_of_two(left: Tensor, right: Tensor) -> Tensor:
    """By parts of the inner axis where it is long and `left` a transposed view, which oneDNN copies
    first: a part and its copy fit a processor's cache."""
    if left.ndim > 2 or left.stride(-1) == 1 or len(right) <= 2 * PART:
        return _onednn(left, right.T)
    first, *others = zip(left.split(PART, dim=1), right.split(PART), strict=True)
    total = _onednn(first[0], first[1].T)
    for a, b in others:
        total += _onednn(a, b.T)
    return total


def _stacked(members: list[Tensor]) -> Tensor:
    return members[0][None] if len(members) == 1 else torch.stack(members)


def _onednn(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, then: str = "none", kind: str = ""
) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, then, [], kind)
    return found


def _by_onednn(left: Tensor, right: Tensor) -> bool:
    """Whether left · right is oneDNN's to make."""
    if library() != "onednn" or not left.is_cpu or not left.dtype == right.dtype == torch.float32:
        return False
    if right.ndim == 2 and left.ndim >= 2:
        m = left.numel() // max(1, left.shape[-1])
    elif left.ndim == right.ndim == 3 and len(left) == len(right):
        m = left.shape[1]
    else:
        return False
    k, n = right.shape[-2:]
    return (
        min(m, n) >= LEAST_ROWS and m * k * n >= LEAST_WORK and not torch.is_autocast_enabled("cpu")
    )


def _is_amd_with_avx512() -> bool:
    """Whether MKL leaves half of the processor unused."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    described = platform.processor()
    if CPU_INFO.is_file():
        described += CPU_INFO.read_text()
    return "AuthenticAMD" in described


def _has_onednn() -> bool:
    """Whether PyTorch offers oneDNN's linear layer, as Inductor calls it."""
    layer = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if layer is None or not torch.backends.mkldnn.is_available():
        return False
    return [argument.name for argument in layer.default._schema.arguments] == _ARGUMENTS
