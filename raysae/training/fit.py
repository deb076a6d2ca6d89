"""The reconstruction error of stacked SAEs and its mean square, in few passes over the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Fit = tuple[Tensor, Tensor]


def fit(decoded: Tensor, batch: Tensor, b_dec: Tensor, centred: Tensor | None = None) -> Fit:
    """Differentiable in `decoded` and `b_dec`.

    Args:
        decoded: activations · W_dec, (m, n, d_in).
        batch, b_dec: (m, n, d_in), (m, d_in).
        centred: batch − b_dec in the dtype of `batch`, without gradient, where it is there.

    Returns:
        decoded + b_dec − batch, (m, n, d_in), and the squared error of a token, mean over the
        batch, (m,).
    """
    if batch.is_cuda:
        error = decoded + (b_dec[:, None] - batch)
        return error, error.pow(2).sum((1, 2)) / error.shape[1]
    if centred is None:
        with torch.no_grad():
            centred = batch - b_dec[:, None]
    error, squared = _Fit.apply(decoded, centred, b_dec)
    return error, squared


class _Fit(torch.autograd.Function):
    """Autograd alone would write three more tensors of the batch's size."""

    @staticmethod
    def forward(
        ctx: Any,
        decoded: Tensor,
        centred: Tensor,
        b_dec: Tensor,  # noqa: ARG004 - its gradient is returned
    ) -> Fit:
        error = decoded - centred
        ctx.save_for_backward(error)
        ctx.set_materialize_grads(False)
        ctx.dtype = decoded.dtype
        squared = torch.linalg.vector_norm(error, dim=2).square_()
        return error, squared.sum(1) / error.shape[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_error, grad_squared = grads
        (error,) = ctx.saved_tensors
        grad = grad_error
        if grad_squared is not None:
            grad = error * (grad_squared * (2 / error.shape[1]))[:, None, None]
            if grad_error is not None:
                grad += grad_error
        if grad is None:
            return None, None, None
        return grad.to(ctx.dtype), None, grad.sum(1)
