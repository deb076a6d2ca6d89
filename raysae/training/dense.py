"""Products of stacked SAEs in which any feature may take part, with gradients of their own.

Autograd would make one more product than there is use for: the gradient of a batch, of which only
the sum over tokens is wanted, for b_dec. Tensors between products are in the products' dtype, which
under autocast is half of float32; sums are in float32 and so are parameters' gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raysae import products


def products_dtype(like: Tensor) -> torch.dtype:
    """In which products are made: autocast's where that is on, else that of `like`."""
    device = like.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return like.dtype


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left · right, of three axes and one dtype, given in `dtype`: not rounded to theirs first
    where the device can."""
    if left.dtype == dtype:
        return products.matmul(left, right)
    if left.is_cuda:
        return torch.bmm(left, right, out_dtype=dtype)
    return torch.bmm(left, right).to(dtype)


def affine(bias: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """bias + left · right, of (m, d), (m, n, k) and (m, k, d), all of one dtype."""
    if len(left) == 1 and left.is_cuda:  # the bias is added by the product itself
        return torch.addmm(bias[0], left[0], right[0])[None]
    return products.affine(bias, left, right)


def encode(batch: Tensor, W_enc: Tensor, b_dec: Tensor) -> Tensor:
    """(batch − b_dec) · W_enc, (m, n, d_sae), differentiable in the parameters.

    Args:
        batch: (m, n, d_in).
        W_enc, b_dec: (m, d_in, d_sae), (m, d_in).
    """
    encoded: Tensor = _Encode.apply(batch, W_enc, b_dec, products_dtype(batch))
    return encoded


def reconstruct(
    acts: Tensor, centred: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A standard SAE behind its ReLU, differentiable in the parameters.

    Args:
        acts: activations (m, n, d_sae) that centred · W_enc + b_enc gave, without gradient.
        centred: batch − b_dec, (m, n, d_in), without gradient, in the dtype of `acts`.
        W_enc, b_enc, W_dec, b_dec: the parameters.

    Returns:
        acts · W_dec, (m, n, d_in); the activations with a gradient; and the sum of a token's
        activations, weighted by decoder norms, mean over the batch, (m,).
    """
    decoded, own, l1 = _Reconstruct.apply(acts, centred, W_enc, b_enc, W_dec, b_dec)
    return decoded, own, l1


def _of_encoder(centred: Tensor, grad: Tensor, W_enc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of W_enc, of a bias behind it, and of b_dec, from that of the pre-activations."""
    dtype = W_enc.dtype
    grad_bias = grad.sum(1, dtype=dtype)
    # b_dec is subtracted from every token alike: what reaches it is summed over tokens first.
    grad_b_dec = -torch.bmm(W_enc, grad_bias[:, :, None])[:, :, 0]
    return product(centred.mT, grad, dtype), grad_bias, grad_b_dec


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, batch: Tensor, W_enc: Tensor, b_dec: Tensor, dtype: torch.dtype
    ) -> Tensor:
        centred = (batch - b_dec[:, None]).to(dtype)
        ctx.save_for_backward(centred, W_enc)
        return product(centred, W_enc.to(dtype), dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        centred, W_enc = ctx.saved_tensors
        grad_W, _, grad_b_dec = _of_encoder(centred, grads[0].to(centred.dtype), W_enc)
        return None, grad_W, grad_b_dec, None


class _Reconstruct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        acts: Tensor,
        centred: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,  # noqa: ARG004 - its gradient is returned
        W_dec: Tensor,
        b_dec: Tensor,  # noqa: ARG004
    ) -> tuple[Tensor, Tensor, Tensor]:
        W, norms, sums = W_dec.to(acts.dtype), W_dec.norm(dim=-1), acts.sum(1, dtype=W_dec.dtype)
        ctx.save_for_backward(acts, centred, W_enc, W_dec, W, norms, sums)
        ctx.set_materialize_grads(False)
        decoded = product(acts, W, W_dec.dtype)
        return decoded, acts.view_as(acts), (sums * norms).sum(1) / acts.shape[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_decoded, grad_acts, grad_l1 = grads
        acts, centred, W_enc, W_dec, W, norms, sums = ctx.saved_tensors
        assert grad_decoded is not None and grad_l1 is not None
        of_token = grad_l1 / acts.shape[1]  # (m,), of a token's weighted sum
        of_acts = (of_token[:, None] * norms).to(acts.dtype)
        grad_out = grad_decoded.to(acts.dtype)
        grad = affine(of_acts, grad_out, W.mT)
        if grad_acts is not None:
            grad += grad_acts
        torch.ops.aten.threshold_backward.grad_input(grad, acts, 0.0, grad_input=grad)
        grad_W_enc, grad_b_enc, grad_b_dec = _of_encoder(centred, grad, W_enc)
        grad_W_dec = product(acts.mT, grad_out, W_dec.dtype)
        of_norms = of_token[:, None] * sums
        grad_W_dec.addcmul_(W_dec, (of_norms / norms.clamp_min(1e-30))[:, :, None])
        return None, None, grad_W_enc, grad_b_enc, grad_W_dec, grad_b_dec
