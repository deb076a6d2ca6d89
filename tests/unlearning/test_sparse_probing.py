"""SAEBench's sparse probing on a world's own texts."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from unlearning_bench import Bench, make_sae

from raysae.sparse_probing import SparseProbing
from raysae.worlds import World

K = [1, 5]


def with_few_texts(world: World, train: int = 40, test: int = 20) -> World:
    assert world.probe_texts is not None
    sizes = {"train": train, "test": test}
    texts = {
        part: {name: rows[: sizes[part]] for name, rows in classes.items()}
        for part, classes in world.probe_texts.items()
    }
    return dataclasses.replace(world, probe_texts=texts)


@pytest.fixture(scope="module")
def probing(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> SparseProbing:
    folder = tmp_path_factory.mktemp("probing")
    return SparseProbing(
        with_few_texts(bench.world), bench.model, bench.hook_name, folder, k_values=K
    )


def test_a_trained_sae_is_probed_beside_the_model(probing: SparseProbing, sae_of: Any) -> None:
    found = probing.evaluate(sae_of("topk", True))
    assert set(found) == {"sae", "llm", *(f"{who}_top_{k}" for who in ("sae", "llm") for k in K)}
    assert all(0.4 <= value <= 1.0 for value in found.values())
    assert found["sae"] > 0.9 and found["llm"] > 0.9
    assert found["sae_top_5"] >= found["sae_top_1"]


def test_the_same_sae_gives_the_same_numbers(probing: SparseProbing, sae_of: Any) -> None:
    first, second = (probing.evaluate(sae_of("topk", True)) for _ in range(2))
    assert first == second


def test_the_models_own_accuracies_do_not_depend_on_the_sae(
    probing: SparseProbing, sae_of: Any
) -> None:
    one, other = (probing.evaluate(sae_of("topk", trained)) for trained in (True, False))
    llm = [name for name in one if name.startswith("llm")]
    assert [one[name] for name in llm] == [other[name] for name in llm]
    assert one["sae_top_5"] != other["sae_top_5"]


def test_features_that_mirror_the_model_are_as_good_as_the_model(
    probing: SparseProbing, bench: Bench
) -> None:
    """Features +x_i and -x_i with a bias that keeps them firing are the model's own activations:
    each class's best feature is then its best neuron."""
    d = bench.model.cfg.d_model
    offset = 100.0
    eye = torch.eye(d)
    weights = {
        "W_enc": eye,
        "b_enc": torch.full((d,), offset),
        "W_dec": eye,
        "b_dec": torch.zeros(d),
    }
    sae = make_sae("standard", weights)
    found = probing.evaluate(sae)
    assert found["sae_top_1"] == pytest.approx(found["llm_top_1"], abs=0.05)
    assert found["sae_top_5"] == pytest.approx(found["llm_top_5"], abs=0.05)


def test_nothing_outside_is_changed(probing: SparseProbing, sae_of: Any) -> None:
    import jaxtyping
    from sae_bench.sae_bench_utils import dataset_info, dataset_utils

    sae = sae_of("topk", True)
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    loader = dataset_utils.get_multi_label_train_test_data
    state, checks = torch.get_rng_state(), jaxtyping.config.jaxtyping_disable
    with torch.no_grad():
        probing.evaluate(sae)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert jaxtyping.config.jaxtyping_disable == checks
    assert dataset_utils.get_multi_label_train_test_data is loader
    assert "embedded" not in dataset_info.chosen_classes_per_dataset
    assert all(torch.equal(sae.state_dict()[name], before[name]) for name in before)


def test_the_worlds_texts_are_of_five_classes_and_not_the_same_twice(bench: Bench) -> None:
    texts = bench.world.probe_texts
    assert texts is not None
    for part, count in (("train", 200), ("test", 100)):
        assert len(texts[part]) == 5
        assert all(len(rows) == count for rows in texts[part].values())
    shared = [set(texts["train"][c]) & set(texts["test"][c]) for c in texts["train"]]
    assert np.mean([len(rows) for rows in shared]) < 5
