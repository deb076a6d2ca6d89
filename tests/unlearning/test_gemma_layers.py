"""The fused layers compute what TransformerLens' blocks do."""

from __future__ import annotations

import pytest
import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig

from raysae.unlearning import compiled, gemma_layers
from raysae.unlearning.gemma_layers import GemmaLayersAfter

ANSWERS = (3, 4, 5, 6, 7, 8, 9, 10)


def model(kv_heads: int, attention: str, biases: bool, d_head: int) -> HookedTransformer:
    """Of random weights; `attention` has a letter for each layer, g or l."""
    config = HookedTransformerConfig(
        n_layers=len(attention), d_model=32, d_head=d_head, n_heads=4, n_ctx=48, d_vocab=20,
        d_mlp=48, n_key_value_heads=None if kv_heads == 4 else kv_heads, normalization_type="RMS",
        act_fn="gelu_pytorch_tanh", gated_mlp=True, use_normalization_before_and_after=True,
        positional_embedding_type="rotary", rotary_dim=d_head, attn_scores_soft_cap=5.0,
        original_architecture="Gemma2ForCausalLM", use_local_attn=True, window_size=3,
        attn_types=[{"g": "global", "l": "local"}[letter] for letter in attention], seed=0,
    )  # fmt: skip
    torch.manual_seed(0)
    made = HookedTransformer(config)
    for name, parameter in made.named_parameters():
        of_bias = name.rpartition(".")[2].startswith(("b_", "_b_"))
        spread = float(biases) if of_bias else 0.3
        parameter.data = torch.randn(parameter.shape) * spread
    return made


@pytest.mark.parametrize("biases", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("attention", ["gggg", "gllg", "gggl", "gg"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(
    ("is_compiled", "d_head", "length"),
    [(False, 8, 12), (False, 64, 40), (True, 32, 12), (True, 64, 40)],
)
@torch.no_grad()
def test_layers_in_pieces_equal_one_forward_pass(
    kv_heads: int,
    attention: str,
    biases: bool,
    is_compiled: bool,
    d_head: int,
    length: int,
    monkeypatch: pytest.MonkeyPatch,
):
    if not is_compiled:
        monkeypatch.setattr(compiled, "library", None)
    elif compiled.library is None:
        pytest.skip("nothing was compiled when raysae was installed")
    made = model(kv_heads, attention, biases, d_head)
    assert gemma_layers.is_gemma_shaped(made.cfg)
    _, cache = made.run_with_cache(torch.randint(20, (6, length)))
    resid = cache["blocks.0.hook_resid_post"]
    expected = cache[f"blocks.{len(attention) - 1}.hook_resid_post"]
    layers = GemmaLayersAfter(made, 0, ANSWERS)
    assert {block.is_compiled for block in (*layers._before, layers._last)} == {is_compiled}
    same, rows = torch.arange(6), torch.tensor([5, 0, 0, 3])
    past = layers.extend(resid[:, :4], [], same)
    past = layers.extend(resid[:, 4:7], past, same)
    found = layers._behind_blocks(layers.answering(resid[rows, 7:], past, rows))
    torch.testing.assert_close(found, expected[rows, -1], rtol=1e-4, atol=1e-4)
    # Rows that answer before what they are filled up with.
    at = torch.tensor([4, 0, 3, 2])
    found = layers._behind_blocks(layers.answering(resid[rows, 7:], past, rows, at))
    torch.testing.assert_close(found, expected[rows, 7 + at], rtol=1e-4, atol=1e-4)
    # Without a past, and without layers.
    found = layers._behind_blocks(layers.answering(resid, [], same))
    torch.testing.assert_close(found, expected[:, -1], rtol=1e-4, atol=1e-4)
    last = GemmaLayersAfter(made, len(attention) - 1, ANSWERS)
    assert torch.equal(last.answering(expected, [], same), expected[:, -1])


@pytest.mark.parametrize("n", [8, 4096])
def test_tanh_keeps_all_digits(n: int):
    """Of small numbers too, as attention scores are below their cap."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(4, n, generator=generator)
    x = torch.cat([drawn * 10.0**e for e in range(-6, 3)], dim=1)
    exact = x.double().tanh()
    found = gemma_layers._tanh_(x)
    assert found is x
    assert ((found.double() - exact) / exact).abs().max() < 2 * torch.finfo(torch.float32).eps
