"""A world's model as a TransformerLens model, built from its Hugging Face folder alone.

TransformerLens looks configurations up by the names of published models. Here the configuration is
written by hand from config.json, so that any folder of a known architecture loads, offline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions.gemma import convert_gemma_weights
from transformer_lens.pretrained.weight_conversions.llama import convert_llama_weights
from transformer_lens.pretrained.weight_conversions.neox import convert_neox_weights
from transformers import (
    AutoTokenizer,
    Gemma2ForCausalLM,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from raysae.worlds.tokens import with_padding
from raysae.worlds.world import (
    CONTEXT,
    World,
    check_hook,
    hook_layer,
    read_model_config,
    unknown_name,
)

__all__ = [
    "ARCHITECTURES",
    "check_hook",
    "from_hugging_face",
    "hook_layer",
    "load_model",
    "load_tokenizer",
]


@dataclass(frozen=True)
class Architecture:
    """How TransformerLens is to run one Hugging Face architecture."""

    hugging_face_class: type[PreTrainedModel]
    config: Callable[[Any], dict[str, Any]]
    """From the Hugging Face config to the arguments of HookedTransformerConfig; raises ValueError
    for what TransformerLens would run as another function."""
    convert_weights: Callable[[Any, HookedTransformerConfig], Mapping[str, torch.Tensor]]


def _gemma2_config(config: Any) -> dict[str, Any]:
    _expect(config, attention_bias=False)
    windowed = {"sliding_attention": "local", "full_attention": "global"}
    return {
        "d_model": config.hidden_size,
        "d_head": config.head_dim,
        "n_heads": config.num_attention_heads,
        "n_key_value_heads": config.num_key_value_heads,
        "d_mlp": config.intermediate_size,
        "n_layers": config.num_hidden_layers,
        "n_ctx": config.max_position_embeddings,
        "d_vocab": config.vocab_size,
        "eps": config.rms_norm_eps,
        "act_fn": config.hidden_activation,
        "gated_mlp": True,
        "normalization_type": "RMS",
        "use_normalization_before_and_after": True,
        "final_rms": True,
        "use_attn_scale": True,
        "attn_scale": config.query_pre_attn_scalar**0.5,
        "attn_scores_soft_cap": config.attn_logit_softcapping or -1.0,  # -1 is "no cap"
        "output_logits_soft_cap": config.final_logit_softcapping or -1.0,
        "use_local_attn": True,
        "attn_types": [windowed[kind] for kind in config.layer_types],
        "window_size": config.sliding_window,
        **_rotary(config, config.head_dim),
    }


def _gpt_neox_config(config: Any) -> dict[str, Any]:
    _expect(config, attention_bias=True)
    d_head = config.hidden_size // config.num_attention_heads
    return {
        "d_model": config.hidden_size,
        "d_head": d_head,
        "n_heads": config.num_attention_heads,
        "d_mlp": config.intermediate_size,
        "n_layers": config.num_hidden_layers,
        "n_ctx": config.max_position_embeddings,
        "d_vocab": config.vocab_size,
        "eps": config.layer_norm_eps,
        "act_fn": config.hidden_act,
        "normalization_type": "LN",
        "parallel_attn_mlp": config.use_parallel_residual,
        **_rotary(config, int(d_head * config.rope_parameters["partial_rotary_factor"])),
    }


def _llama_config(config: Any) -> dict[str, Any]:
    _expect(config, attention_bias=False, mlp_bias=False)
    grouped = config.num_key_value_heads != config.num_attention_heads
    return {
        "d_model": config.hidden_size,
        "d_head": config.head_dim,
        "n_heads": config.num_attention_heads,
        "n_key_value_heads": config.num_key_value_heads if grouped else None,
        "d_mlp": config.intermediate_size,
        "n_layers": config.num_hidden_layers,
        "n_ctx": config.max_position_embeddings,
        "d_vocab": config.vocab_size,
        "eps": config.rms_norm_eps,
        "act_fn": config.hidden_act,
        "gated_mlp": True,
        "normalization_type": "RMS",
        "final_rms": True,
        **_rotary(config, config.head_dim),
    }


def _rotary(config: Any, dim: int) -> dict[str, Any]:
    """Rotary positions on the first `dim` dimensions of every head, scaled as the config says."""
    rope = config.rope_parameters
    fields = {
        "positional_embedding_type": "rotary",
        "rotary_dim": dim,
        "rotary_base": rope["rope_theta"],
    }
    if rope["rope_type"] == "default":
        return fields
    if rope["rope_type"] == "llama3":
        return fields | {
            "use_NTK_by_parts_rope": True,
            "NTK_by_parts_factor": rope["factor"],
            "NTK_by_parts_low_freq_factor": rope["low_freq_factor"],
            "NTK_by_parts_high_freq_factor": rope["high_freq_factor"],
            "NTK_original_ctx_len": rope["original_max_position_embeddings"],
        }
    raise ValueError(
        f"rotary positions of rope_type {rope['rope_type']!r} are not supported: "
        "valid are 'default', 'llama3'"
    )


def _expect(config: Any, **values: bool) -> None:
    """Refuse what TransformerLens' weight conversion would leave out or miss."""
    for name, value in values.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{config.model_type} with {name}={getattr(config, name)} is not supported: "
                f"TransformerLens runs it with {name}={value}"
            )


ARCHITECTURES: dict[str, Architecture] = {
    "Gemma2ForCausalLM": Architecture(Gemma2ForCausalLM, _gemma2_config, convert_gemma_weights),
    "GPTNeoXForCausalLM": Architecture(GPTNeoXForCausalLM, _gpt_neox_config, convert_neox_weights),
    "LlamaForCausalLM": Architecture(LlamaForCausalLM, _llama_config, convert_llama_weights),
}


def load_model(
    world: World,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    *,
    trained_on: bool = False,
) -> HookedTransformer:
    """Return the world's model, frozen and in evaluation mode, on `device` in `dtype`.

    `dtype` is the world's unless given. With `trained_on` it is the model that SAEs are trained on,
    where that is not the one that is asked.

    Its weights are the folder's as they are (nothing is folded or centred), so that the residual
    stream is the one SAEBench's absolute multipliers are meant for. ``cfg.model_name`` is the name
    SAEBench recognises. Autograd stays as it is for everything else.

    Raises ValueError for an architecture not in ARCHITECTURES, and for a form of one (scaled rotary
    positions, for example) that TransformerLens does not run.
    """
    folder = world.model_path if trained_on else world.asked_path
    dtype = getattr(torch, world.dtype) if dtype is None else dtype
    architecture = _architecture(folder)
    with _no_progress_bars():
        source = architecture.hugging_face_class.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", local_files_only=True
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = from_hugging_face(source, tokenizer, max(CONTEXT, world.seq_len), device)
    if world.pad_token is not None:
        with_padding(model.tokenizer, world.pad_token)
    model.cfg.model_name = world.sae_model_name if trained_on else world.saebench_model_name
    return model


def load_tokenizer(world: World, *, trained_on: bool = False) -> Any:
    """The tokenizer of `load_model`'s model, without its weights."""
    folder = world.model_path if trained_on else world.asked_path
    config = HookedTransformerConfig(
        n_layers=1, d_model=1, d_head=1, n_ctx=1, act_fn="relu", d_vocab=1, init_weights=False,
        device="cpu", original_architecture=_architecture(folder).hugging_face_class.__name__,
    )  # fmt: skip
    # TransformerLens sets a tokenizer up where it makes a model: here one of no size.
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = HookedTransformer(config, tokenizer, default_padding_side="right")
    if world.pad_token is not None:
        with_padding(model.tokenizer, world.pad_token)
    return model.tokenizer


def from_hugging_face(
    source: PreTrainedModel, tokenizer: Any, n_ctx: int, device: str | torch.device = "cpu"
) -> HookedTransformer:
    """The same function in TransformerLens, frozen and in evaluation mode, on `device`.

    Args:
        source: of one of `ARCHITECTURES`, on any device; its weights are copied, in their type.
        tokenizer: with tokens that begin, end and pad.
        n_ctx: positions that are kept room for, if the model has so many.
        device: where it is to lie; a `source` on a GPU never comes to the host.

    Raises ValueError for a form that TransformerLens does not run.
    """
    architecture = ARCHITECTURES[type(source).__name__]
    fields = architecture.config(source.config)
    fields["n_ctx"] = min(fields["n_ctx"], n_ctx)
    config = HookedTransformerConfig(
        **fields,
        original_architecture=type(source).__name__,
        device=str(device),
        dtype=source.dtype,
        init_weights=False,  # all are loaded below, and drawing them would move the random state
    )
    model = HookedTransformer(config, tokenizer, move_to_device=False, default_padding_side="right")
    model.requires_grad_(False).eval().to(device, print_details=False)
    weights = architecture.convert_weights(source, config)
    model.load_and_process_state_dict(
        {name: weight.detach().clone() for name, weight in weights.items()},
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model


def _architecture(folder: Path) -> Architecture:
    named = read_model_config(folder).get("architectures") or []
    for name in named:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    raise ValueError(
        f"{folder / 'config.json'}: "
        + unknown_name("architecture", ", ".join(named) or "(none given)", ARCHITECTURES)
    )


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep a caller's terminal free of the bars of a load that takes a moment."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
