"""The exported SAE does on raw activations what the training SAE does on scaled ones."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import SAE
from torch import Tensor
from training_bench import ARCHITECTURES, PICKS_OVER_A_BATCH, every_architecture

from raysae.training.run import SAERun
from raysae.training.saes import export_sae, make_training_sae
from raysae.training.spec import SPARSITY_FIELD, SAESpec

TRAINED: dict[str, dict[str, Any]] = {}
"""State of the run of each architecture, trained once."""


@pytest.fixture
def trained(make_spec, make_store, request) -> tuple[SAERun, Tensor]:
    """A run of 150 steps on rows of norm about 12 (scale about 1/3), and the raw rows."""
    run = SAERun(make_spec(request.param, steps=150, lr=5e-3), make_store())
    if request.param in TRAINED:
        run.load_state_dict(TRAINED[request.param])
    else:
        for _ in range(150):
            run.advance()
        TRAINED[request.param] = copy.deepcopy(run.state_dict())
    return run, torch.from_numpy(np.concatenate(run.source._chunks))


def per_architecture(test: Any) -> Any:
    return pytest.mark.parametrize("trained", ARCHITECTURES, indirect=True)(test)


def training_acts(run: SAERun, raw: Tensor) -> Tensor:
    """What the training SAE makes of the rows at inference, in its own scaled units.

    Where training picks over a batch, inference goes by the threshold.
    """
    sae, x = run.sae, raw * run.source.scale
    if run.spec.sae.architecture not in PICKS_OVER_A_BATCH:
        return sae.encode(x)
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    return torch.where(pre > sae.topk_threshold, pre, torch.zeros(()))


@per_architecture
@torch.no_grad()
def test_export_reproduces_the_training_sae_in_raw_units(trained):
    run, raw = trained
    scale = run.source.scale
    assert abs(scale - 1) > 0.3  # else the test would prove nothing
    exported = export_sae(run.sae, scale)
    acts, wanted = exported.encode(raw), training_acts(run, raw)
    assert torch.equal(acts > 0, wanted > 0)
    assert 0 < (acts > 0).float().mean() < 1
    torch.testing.assert_close(acts, wanted / scale, rtol=1e-4, atol=1e-4)
    reconstruction = run.sae.decode(wanted) / scale
    torch.testing.assert_close(exported.decode(acts), reconstruction, rtol=1e-4, atol=1e-4)


@per_architecture
def test_exported_decoder_rows_have_norm_one(trained):
    run, _ = trained
    exported = export_sae(run.sae, run.source.scale)
    torch.testing.assert_close(exported.W_dec.norm(dim=-1), torch.ones(32))


@per_architecture
def test_decoder_rows_of_any_norm_are_folded_into_the_encoder(trained):
    run, raw = trained
    with torch.no_grad():
        run.sae.W_dec.mul_(torch.linspace(0.5, 2.0, 32)[:, None])
        x = run.sae.encode(raw * run.source.scale)
        wanted = run.sae.decode(x) / run.source.scale
    exported = export_sae(run.sae, run.source.scale)
    torch.testing.assert_close(exported.W_dec.norm(dim=-1), torch.ones(32))
    if run.spec.sae.architecture not in PICKS_OVER_A_BATCH:
        torch.testing.assert_close(exported(raw), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", sorted(PICKS_OVER_A_BATCH))
def test_batchtopk_is_exported_as_jumprelu_with_its_threshold_in_raw_units(
    architecture: str, make_spec, make_store
):
    run = SAERun(make_spec(architecture, steps=150), make_store())
    for _ in range(150):
        run.advance()
    exported = export_sae(run.sae, run.source.scale)
    assert exported.cfg.architecture() == "jumprelu"
    assert run.sae.topk_threshold > 0
    threshold = torch.full((32,), run.sae.topk_threshold.item() / run.source.scale)
    torch.testing.assert_close(exported.threshold.data, threshold)


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu", "topk"])
def test_other_architectures_keep_theirs(architecture: str, make_spec, make_store):
    run = SAERun(make_spec(architecture), make_store())
    assert export_sae(run.sae, 0.3).cfg.architecture() == architecture


@per_architecture
def test_an_exported_topk_sae_has_k_active_features_at_most(trained):
    run, raw = trained
    active = (export_sae(run.sae, run.source.scale).encode(raw) > 0).sum(1)
    if run.spec.sae.architecture == "topk":
        assert active.max() == 4
    assert active.float().mean() > 1


@per_architecture
def test_a_saved_sae_loads_and_encodes_equally(trained, tmp_path: Path):
    run, raw = trained
    exported = export_sae(run.sae, run.source.scale)
    exported.save_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert type(loaded) is type(exported)
    with torch.no_grad():
        assert torch.equal(loaded.encode(raw), exported.encode(raw))
        assert torch.equal(loaded(raw), exported(raw))


@per_architecture
def test_exporting_leaves_the_training_sae_as_it_was(trained):
    run, _ = trained
    before = {name: tensor.clone() for name, tensor in run.sae.state_dict().items()}
    config = run.sae.cfg.to_dict()
    exported = export_sae(run.sae, run.source.scale)
    for tensor in exported.state_dict().values():
        tensor.zero_()
    assert all(torch.equal(run.sae.state_dict()[name], before[name]) for name in before)
    assert run.sae.cfg.to_dict() == config
    assert run.sae.training
    assert run.sae.W_dec.requires_grad
    run.advance()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_exporting_leaves_the_global_random_state_as_it_was(
    architecture: str, make_spec, make_store
):
    run = SAERun(make_spec(architecture), make_store())
    before = torch.get_rng_state()
    export_sae(run.sae, 0.5)
    assert torch.equal(torch.get_rng_state(), before)


@per_architecture
def test_an_exported_sae_is_for_inference(trained):
    exported = export_sae(trained[0].sae, 0.5)
    assert not exported.training
    assert not any(parameter.requires_grad for parameter in exported.parameters())


@every_architecture
def test_a_new_sae_has_unit_decoder_rows_and_the_transpose_as_encoder(architecture: str):
    spec = SAESpec(architecture=architecture, d_sae=32, **{SPARSITY_FIELD[architecture]: 4})
    mean = torch.arange(16.0)
    sae = make_training_sae(spec, 16, seed=0, b_dec=mean, model_name="m", hook_name="blocks.1.h")
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(32))
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert torch.equal(sae.b_dec, mean)
    assert (sae.cfg.architecture(), sae.cfg.d_in, sae.cfg.d_sae) == (architecture, 16, 32)
    assert (sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name) == ("m", "blocks.1.h")
    field = SPARSITY_FIELD[architecture]
    assert getattr(sae.cfg, field) == 4


def test_new_weights_depend_on_the_seed_alone_and_leave_the_global_state():
    spec = SAESpec(architecture="topk", d_sae=32, k=4)
    torch.manual_seed(1)
    first = make_training_sae(spec, 16, seed=0)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(after, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(make_training_sae(spec, 16, seed=0).W_dec, first.W_dec)
    assert not torch.equal(make_training_sae(spec, 16, seed=1).W_dec, first.W_dec)
