"""The reconstruction error and its square against autograd on their formulas."""

from __future__ import annotations

import pytest
import torch

from raysae.training.fit import fit


@pytest.mark.parametrize("uses", ["square", "error", "both"])
@pytest.mark.parametrize("centred_is_there", [True, False])
def test_values_and_gradients_are_those_of_the_formulas(uses, centred_is_there):
    generator = torch.Generator().manual_seed(0)
    batch, drawn = torch.randn(2, 2, 30, 8, dtype=torch.float64, generator=generator)
    b_dec, weights = torch.randn(2, 2, 8, dtype=torch.float64, generator=generator)
    found = []
    for mine in (True, False):
        decoded, bias = drawn.clone().requires_grad_(), b_dec.clone().requires_grad_()
        if mine:
            centred = batch - b_dec[:, None] if centred_is_there else None
            error, squared = fit(decoded, batch, bias, centred)
        else:
            error = decoded + bias[:, None] - batch
            squared = error.pow(2).sum(2).mean(1)
        loss = torch.zeros((), dtype=torch.float64)
        if uses != "error":
            loss = loss + (squared * torch.tensor([1.0, 3.0])).sum()
        if uses != "square":
            loss = loss + (error.pow(3) * weights[:, None]).sum()
        loss.backward()
        found.append((error, squared, decoded.grad, bias.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_gradient_is_of_the_reconstruction_s_type():
    decoded = torch.randn(2, 30, 8, dtype=torch.bfloat16).requires_grad_()
    error, squared = fit(decoded, torch.randn(2, 30, 8), torch.zeros(2, 8).requires_grad_())
    squared.sum().backward()
    assert error.dtype == torch.float32
    assert decoded.grad is not None
    assert decoded.grad.dtype == torch.bfloat16
