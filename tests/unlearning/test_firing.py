"""What is found without encoding all features is what `SAE.encode` finds."""

from __future__ import annotations

import pytest
import torch
from sae_lens import (
    SAE,
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)
from sae_lens.saes.abstopk_sae import AbsTopKSAE, AbsTopKSAEConfig
from torch import Tensor

from raysae.unlearning import firing

D_IN, D_SAE = 24, 192
FEATURES = torch.tensor([5, 3, 191, 64, 0])


def random_(sae: SAE, seed: int) -> SAE:
    generator = torch.Generator().manual_seed(seed)
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return sae


def top_k(k: int, seed: int = 0, d_sae: int = D_SAE, **config: object) -> TopKSAE:
    return random_(TopKSAE(TopKSAEConfig(d_in=D_IN, d_sae=d_sae, k=k, **config)), seed)


def tokens(seed: int = 1) -> tuple[Tensor, Tensor]:
    """(rows, positions, d_model) and which of them count."""
    generator = torch.Generator().manual_seed(seed)
    resid = torch.randn(40, 9, D_IN, generator=generator)
    return resid, torch.rand(40, 9, generator=generator) < 0.7


def assert_equal_to_encode(sae: SAE, resid: Tensor, counted: Tensor) -> None:
    acts = firing.encode(sae, resid).detach()
    assert 0.0001 < (acts > 0).float().mean() < 0.9
    assert torch.equal(firing.activations_of(sae, resid, FEATURES), acts[:, :, FEATURES])
    expected = (acts[counted] > 0).sum(dim=0).float()
    assert torch.equal(firing.count_firing(sae, resid, counted), expected)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[SAE]:
    """The SAEs of which all features were encoded."""
    found: list[SAE] = []
    own = firing.encode

    def encode(sae: SAE, resid: Tensor) -> Tensor:
        found.append(sae)
        return own(sae, resid)

    monkeypatch.setattr(firing, "encode", encode)
    return found


@pytest.mark.parametrize("k", [1, 4, 12, 48])
@pytest.mark.parametrize("d_sae", [D_SAE, 195, 2048])
@pytest.mark.parametrize(
    "config", [{}, {"apply_b_dec_to_input": False, "rescale_acts_by_decoder_norm": True}]
)
@torch.no_grad()
def test_the_k_largest_are_those_of_encode(k: int, d_sae: int, config: dict[str, bool]):
    sae = top_k(k, d_sae=d_sae, **config)
    assert_equal_to_encode(sae, *tokens())
    assert (firing._largest(sae, tokens()[0]) is None) == ((k, d_sae) == (48, 195)), "few groups"


@torch.no_grad()
def test_fewer_than_k_are_positive():
    sae = top_k(12)
    sae.b_enc -= 8
    acts = firing.encode(sae, tokens()[0])
    fires = (acts > 0).sum(dim=-1)
    assert fires.min() < 12 and fires.max() == 12
    assert_equal_to_encode(sae, *tokens())


@torch.no_grad()
def test_no_feature_fires():
    sae = top_k(4)
    sae.b_enc -= 1000
    resid, counted = tokens()
    assert not firing.count_firing(sae, resid, counted).any()
    assert not firing.activations_of(sae, resid, FEATURES).any()
    assert firing.count_firing(sae, resid[:0], counted[:0]).shape == (D_SAE,)


@torch.no_grad()
def test_of_equals_at_the_last_place_those_that_encode_takes(encoded: list[SAE]):
    sae = top_k(4)
    sae.W_enc[:, 1::2], sae.b_enc[1::2] = sae.W_enc[:, ::2], sae.b_enc[::2]
    assert_equal_to_encode(sae, *tokens())
    encoded.clear()
    sae.activation_fn.k = 5  # of pairs: the last one is half taken
    firing.count_firing(sae, *tokens())
    assert encoded == [sae]
    assert_equal_to_encode(sae, *tokens())


@pytest.mark.parametrize(
    "sae",
    [
        random_(StandardSAE(StandardSAEConfig(d_in=D_IN, d_sae=D_SAE)), 0),
        random_(JumpReLUSAE(JumpReLUSAEConfig(d_in=D_IN, d_sae=D_SAE)), 0),
    ],
    ids=["standard", "jumprelu"],
)
@torch.no_grad()
def test_a_few_features_are_encoded_alone(sae: SAE, encoded: list[SAE]):
    """Of the jump ReLU's random thresholds about half are below zero."""
    resid, _ = tokens()
    found = firing.activations_of(sae, resid, FEATURES)
    assert not encoded
    exact = sae.double().encode(resid.double())[:, :, FEATURES]
    assert torch.equal(found > 0, exact > 0)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-4)


class Other(TopKSAE):
    """Chooses otherwise."""

    def encode(self, x: Tensor) -> Tensor:
        return super().encode(x).flip(-1)


@pytest.mark.parametrize(
    "sae",
    [
        random_(GatedSAE(GatedSAEConfig(d_in=D_IN, d_sae=D_SAE)), 0),
        random_(StandardSAE(StandardSAEConfig(d_in=D_IN, d_sae=D_SAE, dtype="bfloat16")), 0),
        random_(AbsTopKSAE(AbsTopKSAEConfig(d_in=D_IN, d_sae=D_SAE, k=4)), 0),
        random_(Other(TopKSAEConfig(d_in=D_IN, d_sae=D_SAE, k=4)), 0),
        top_k(4, dtype="bfloat16"),
    ],
    ids=["gated", "standard in bfloat16", "absolute", "derived", "bfloat16"],
)
@torch.no_grad()
def test_other_saes_are_encoded(sae: SAE, encoded: list[SAE]):
    resid, counted = tokens()
    firing.count_firing(sae, resid, counted)
    firing.activations_of(sae, resid, FEATURES)
    assert encoded == [sae, sae]
    assert_equal_to_encode(sae, resid, counted)
