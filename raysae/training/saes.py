"""SAELens' training SAEs: made from a spec, and exported as the inference SAE in raw units."""

from __future__ import annotations

from typing import Any

import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata, TrainingSAE
from torch import Tensor

from raysae.training.spec import SAESpec

_CLASSES: dict[str, tuple[Any, Any]] = {
    "standard": (StandardTrainingSAE, StandardTrainingSAEConfig),
    "gated": (GatedTrainingSAE, GatedTrainingSAEConfig),
    "jumprelu": (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig),
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
    "matryoshka_batchtopk": (MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig),
}


def make_training_sae(
    spec: SAESpec,
    d_in: int,
    *,
    seed: int,
    b_dec: Tensor | None = None,
    model_name: str = "",
    hook_name: str = "",
    device: str = "cpu",
) -> TrainingSAE:
    """SAELens' own training SAE with unit-norm decoder rows and W_enc = W_decᵀ.

    Args:
        spec: architecture, width and sparsity.
        d_in: width of the residual stream.
        seed: of the initial weights; the global random state is left as it was.
        b_dec: initial decoder bias (d_in,), e.g. the mean activation.
        model_name, hook_name: recorded in the SAE's metadata, as SAELens does.
    """
    metadata = SAEMetadata(
        model_name=model_name, hook_name=hook_name, context_size=None, prepend_bos=True
    )
    common = {
        "d_in": d_in,
        "d_sae": spec.d_sae,
        "device": device,
        "dtype": "float32",
        "decoder_init_norm": 1.0,
        "normalize_activations": "none",
        "metadata": metadata,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sae_class, config_class = _CLASSES[spec.architecture]
        sae: TrainingSAE = sae_class(config_class(**common, **_sparsity(spec)))
    if b_dec is not None:
        with torch.no_grad():
            sae.b_dec.copy_(b_dec)
    return sae


def _sparsity(spec: SAESpec) -> dict[str, Any]:
    """The arguments of SAELens' configuration that differ between architectures."""
    value = getattr(spec, spec.sparsity)
    if spec.architecture == "matryoshka_batchtopk":
        widths = spec.matryoshka_widths or default_matryoshka_widths(spec.d_sae)
        return {"k": float(value), "matryoshka_widths": list(widths)}
    return {spec.sparsity: int(value) if spec.architecture == "topk" else float(value)}


def default_matryoshka_widths(d_sae: int) -> tuple[int, ...]:
    """An eighth, a quarter, a half and all of the features, as far as they differ."""
    return tuple(sorted({max(1, d_sae // part) for part in (8, 4, 2, 1)}))


@torch.no_grad()
def export_sae(sae: TrainingSAE, scale: float) -> SAE:
    """The inference SAE in raw activation units: what `sae.save_inference_model` would write,
    with the input scaling folded into the weights and decoder rows at norm 1.

    SAEBench's multipliers are absolute, so a score means nothing on scaled activations.

    Args:
        sae: trained on activations multiplied by `scale`; not modified.
        scale: the factor on the activations during training.
    """
    state = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    sae.process_state_dict_for_saving_inference(state)
    with torch.random.fork_rng(devices=[]):  # the constructor draws weights that are replaced
        exported = SAE.from_dict(sae.cfg.get_inference_sae_cfg_dict())
    exported.load_state_dict(state)
    exported.fold_activation_norm_scaling_factor(scale)
    exported.fold_W_dec_norm()
    exported.requires_grad_(False)
    return exported.eval()
