"""The TransformerLens model of a world: the Hugging Face model's function, frozen."""

import dataclasses
import json

import pytest
import torch
from tiny_models import gpt_neox, llama, with_random_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

from raysae.worlds import World, load_world
from raysae.worlds.model import check_hook, hook_layer, load_model
from raysae.worlds.world import valid_hooks


@pytest.fixture(scope="module")
def world() -> World:
    return load_world("embedded")


@pytest.fixture(scope="module")
def model(world):
    return load_model(world)


def hugging_face_logits(folder, tokens):
    source = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return source(tokens).logits


def test_logits_equal_hugging_faces_own(world, model):
    tokenizer = AutoTokenizer.from_pretrained(world.model_path)
    texts = list(world.forget_texts[:16] + world.retain_texts[:16])
    tokens = tokenizer(texts, return_tensors="pt", padding=True)["input_ids"]
    with torch.no_grad():
        ours = model(tokens)
    assert ours.shape == (32, tokens.shape[1], len(tokenizer))
    # Padding is on the right: the positions it fills are the only ones that could see it.
    kept = tokens != tokenizer.pad_token_id
    torch.testing.assert_close(
        ours[kept], hugging_face_logits(world.model_path, tokens)[kept], atol=1e-4, rtol=0
    )


def test_other_shapes_of_gemma2_load_as_well(world, tmp_path):
    """Shared key-value heads, tied embeddings, another window, another scale of the scores."""
    config = Gemma2Config(
        vocab_size=232, hidden_size=48, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=10,
        sliding_window=5, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Gemma2ForCausalLM._from_config(config).save_pretrained(tmp_path)
        tokens = torch.randint(6, 232, (4, 30))
    AutoTokenizer.from_pretrained(world.model_path).save_pretrained(tmp_path)
    other = load_model(dataclasses.replace(world, model_path=tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(
            other(tokens), hugging_face_logits(tmp_path, tokens), atol=1e-4, rtol=1e-4
        )


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        gpt_neox(use_parallel_residual=True, tie_word_embeddings=False),
        gpt_neox(use_parallel_residual=True, tie_word_embeddings=True),
        gpt_neox(use_parallel_residual=False, tie_word_embeddings=False),
        gpt_neox(use_parallel_residual=False, tie_word_embeddings=True),
        gpt_neox(rotary_pct=1.0, rotary_emb_base=500, hidden_act="gelu_new"),
        llama(num_key_value_heads=4, tie_word_embeddings=False),
        llama(num_key_value_heads=4, tie_word_embeddings=True),
        llama(num_key_value_heads=2, tie_word_embeddings=False),
        llama(num_key_value_heads=1, tie_word_embeddings=True, rms_norm_eps=1e-2),
        llama(head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
        llama(rope_parameters=LLAMA3),
    ],
    ids=[
        "neox-parallel", "neox-parallel-tied", "neox-sequential", "neox-sequential-tied",
        "neox-all-rotary", "llama", "llama-tied", "llama-grouped", "llama-one-key-tied",
        "llama-wide-heads", "llama-scaled-rotary",
    ],
)  # fmt: skip
def test_gpt_neox_and_llama_equal_hugging_faces_own(world, tmp_path, config):
    other = load_model(with_random_model(world, tmp_path, config, std=0.2))
    tokens = torch.randint(6, 232, (4, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = other(tokens).log_softmax(-1)
    expected = hugging_face_logits(tmp_path, tokens).log_softmax(-1)
    assert expected.std() > 0.5
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            llama(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
            r"rope_type 'linear'.*'default', 'llama3'",
        ),
        (llama(attention_bias=True), "llama with attention_bias=True"),
        (llama(mlp_bias=True), "llama with mlp_bias=True"),
        (gpt_neox(attention_bias=False), "gpt_neox with attention_bias=False"),
    ],
)
def test_what_transformer_lens_does_not_run_is_refused(world, tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        load_model(with_random_model(world, tmp_path, config))


def test_model_is_frozen_and_autograd_left_on(world):
    assert torch.is_grad_enabled()
    model = load_model(world)
    assert torch.is_grad_enabled()
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.cfg.model_name == "gemma-2-2b-it"
    assert model.tokenizer.padding_side == "right"


def test_loading_leaves_the_random_state_alone(world):
    before = torch.get_rng_state()
    load_model(world)
    assert torch.equal(before, torch.get_rng_state())


def test_dtype_is_taken(world):
    assert load_model(world, dtype=torch.bfloat16).W_E.dtype == torch.bfloat16


def test_unknown_architecture_is_named_with_the_supported_ones(world, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Gemma3ForCausalLM"]}))
    with pytest.raises(ValueError, match=r"'Gemma3ForCausalLM'.*'Gemma2ForCausalLM'"):
        load_model(dataclasses.replace(world, model_path=tmp_path))


def test_hooks_have_a_layer_after_them(world, model):
    hooks = valid_hooks(world)
    assert hooks == [f"blocks.{layer}.hook_resid_post" for layer in range(3)]
    assert world.default_hook_name in hooks
    config = json.loads((world.model_path / "config.json").read_text())
    for source in (world, model, model.cfg, config, Gemma2Config(**config)):
        assert check_hook(source, hooks[1]) == hook_layer(hooks[1]) == 1
        with pytest.raises(ValueError, match=r"valid are 'blocks\.0\.hook_resid_post'"):
            check_hook(source, "blocks.3.hook_resid_post")
    with pytest.raises(ValueError, match=r"did you mean 'blocks\.1\.hook_resid_post'"):
        check_hook(world, "blocks.1.hook_resid_pst")


def test_hook_layer_refuses_other_hooks():
    with pytest.raises(ValueError, match="hook_mlp_out"):
        hook_layer("blocks.0.hook_mlp_out")
