"""Short cuts of the stacked step against what they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raysae.training import stacked


def test_a_standard_sae_has_the_same_gradients_from_what_fires_alone(monkeypatch):
    """Two members of different sparsity; a term in the activations stands for a regularizer."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    drawn = {
        "W_enc": draw(2, 8, 24),
        "W_dec": draw(2, 24, 8),
        "b_enc": draw(2, 24) - torch.tensor([[1.0], [4.0]]),
        "b_dec": draw(2, 8),
    }
    batch, is_forget = draw(2, 40, 8), torch.arange(80).view(2, 40) % 3 == 0
    members = [stacked.Settings(0, torch.zeros(24, dtype=torch.bool), (), 0.0)] * 2
    found = []
    for share, kind in ((0.0, stacked.DenseActs), (1.1, stacked.SparseActs)):
        monkeypatch.setattr(stacked, "SPARSE", share)
        p = {name: tensor.clone().requires_grad_() for name, tensor in drawn.items()}
        forward = stacked.standard(p, batch, members)
        assert isinstance(forward.acts, kind)
        acts = [acts.dense for acts in forward.acts.members()]
        loss = torch.stack(list(forward.losses.values())).sum() + acts[1].pow(2).mean()
        loss.backward()
        gradients = [tensor.grad for tensor in p.values()]
        fired = forward.acts.fired(is_forget)
        found.append([forward.error, *acts, *forward.losses.values(), fired, *gradients])
    for dense, sparse in zip(*found, strict=True):
        torch.testing.assert_close(sparse, dense)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka_batchtopk"])
@pytest.mark.parametrize("ks", [(3, 3), (2, 5)])
def test_picks_from_pieces_are_those_from_the_whole(architecture, ks, monkeypatch):
    """Two members of 40 tokens; pieces of 7 tokens, the last one smaller."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (8, 24), "W_dec": (24, 8), "b_enc": (24,), "b_dec": (8,)}
    p = {name: torch.randn(2, *shape, generator=generator) for name, shape in shapes.items()}
    batch = torch.randn(2, 40, 8, generator=generator)
    members = [stacked.Settings(k, None, (12, 24), 0.0) for k in ks]
    whole = stacked.FORWARD[architecture](p, batch, members)
    monkeypatch.setattr(stacked, "PICKED_FROM", 4 * 2 * 24 * 7)
    pieces = stacked.FORWARD[architecture](p, batch, members)
    for i, k in enumerate(ks):
        acts = pieces.acts.members()[i].dense
        torch.testing.assert_close(acts, whole.acts.members()[i].dense)
        assert 0 < int((acts > 0).sum()) <= k * 40
    torch.testing.assert_close(pieces.error, whole.error)
    assert len(pieces.losses) == len(whole.losses)
