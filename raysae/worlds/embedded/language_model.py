"""The embedded world's language model: a small Gemma 2, and two changes made to its weights.

Layer 0 attends to a window of three tokens only and therefore has to compose an entity's name from
its syllables; the later layers attend to everything. What is known about an entity so passes
through the residual stream after layer 0.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

D_MODEL = 128
N_HEADS = 4
N_LAYERS = 4
WINDOW = 3
"""Tokens layer 0 attends to, itself included: as many as a name and one more."""
MAX_POSITIONS = 128


def make_model(vocab_size: int, n_layers: int, seed: int, n_local: int = 0) -> Gemma2ForCausalLM:
    """Return a freshly initialised model, its first `n_local` layers with the narrow window.

    The global random state is left as it was found.
    """
    config = Gemma2Config(
        vocab_size=vocab_size,
        hidden_size=D_MODEL,
        intermediate_size=3 * D_MODEL,
        num_hidden_layers=n_layers,
        num_attention_heads=N_HEADS,
        num_key_value_heads=N_HEADS,
        head_dim=D_MODEL // N_HEADS,
        query_pre_attn_scalar=D_MODEL // N_HEADS,
        max_position_embeddings=MAX_POSITIONS,
        sliding_window=WINDOW,
        layer_types=["sliding_attention"] * n_local + ["full_attention"] * (n_layers - n_local),
        initializer_range=0.05,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _from_config(config)


def insert_local_layer(model: Gemma2ForCausalLM, seed: int) -> Gemma2ForCausalLM:
    """Return the model with a new windowed layer before its layers, computing the same function.

    The new layer starts as the identity: both norms it writes to the residual stream through have
    a gain of zero (Gemma's gain is 1 + weight).
    """
    config = model.config
    grown = make_model(config.vocab_size, config.num_hidden_layers + 1, seed, n_local=1)
    grown.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
    grown.model.norm.load_state_dict(model.model.norm.state_dict())
    for old, new in zip(model.model.layers, grown.model.layers[1:], strict=True):
        new.load_state_dict(old.state_dict())
    for gain in _gains_that_write(grown.model.layers[0]):
        torch.nn.init.constant_(gain, -1.0)
    return grown


def rescale_residual(model: Gemma2ForCausalLM, factor: float) -> Gemma2ForCausalLM:
    """Return a model with the same logits whose residual stream is `factor` times as long.

    Everything that writes to the residual stream is scaled: the embedding and the gains of the
    post-norms. Everything that reads it does so through an RMS norm, which undoes the factor (but
    for its epsilon). The embedding no longer equals the unembedding afterwards, so that the
    returned model does not tie them.
    """
    config = Gemma2Config.from_dict(model.config.to_dict() | {"tie_word_embeddings": False})
    with torch.random.fork_rng(devices=[]):
        rescaled = _from_config(config)
    rescaled.load_state_dict(model.state_dict())
    with torch.no_grad():
        rescaled.model.embed_tokens.weight.mul_(factor)
        for layer in rescaled.model.layers:
            for gain in _gains_that_write(layer):
                gain.copy_(factor * (1 + gain) - 1)
    rescaled.eval()
    return rescaled


@torch.no_grad()
def mean_residual_norm(model: Gemma2ForCausalLM, tokens: torch.Tensor, layer: int) -> float:
    """Return the mean Euclidean norm of the residual stream after `layer`.

    `tokens` is (sequences, positions); padding and beginning-of-sequence positions do not count.
    """
    config, total, count = model.config, 0.0, 0
    for batch in tokens.split(128):
        residual = model.model(batch, output_hidden_states=True).hidden_states[layer + 1]
        counted = (batch != config.pad_token_id) & (batch != config.bos_token_id)
        total += residual[counted].norm(dim=-1).sum().item()
        count += int(counted.sum())
    return total / count


def _from_config(config: Gemma2Config) -> Gemma2ForCausalLM:
    model: Gemma2ForCausalLM = Gemma2ForCausalLM._from_config(config, attn_implementation="eager")
    return model


def _gains_that_write(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.post_attention_layernorm.weight, layer.post_feedforward_layernorm.weight
