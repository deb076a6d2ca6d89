"""SAELens' training SAEs: made from a spec, and exported as the inference SAE in raw units."""

from __future__ import annotations

import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata, TrainingSAE
from torch import Tensor

from raysae.training.spec import SAESpec


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
        sae: TrainingSAE
        if spec.architecture == "standard":
            config = StandardTrainingSAEConfig(**common, l1_coefficient=spec.l1_coefficient)
            sae = StandardTrainingSAE(config)
        elif spec.architecture == "topk":
            sae = TopKTrainingSAE(TopKTrainingSAEConfig(**common, k=int(spec.k or 0)))
        else:
            sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**common, k=float(spec.k or 0)))
    if b_dec is not None:
        with torch.no_grad():
            sae.b_dec.copy_(b_dec)
    return sae


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
