"""What a plan says of size and time follows from the texts, and from what was measured."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from raysae.config import RunConfig, load_config
from raysae.search import cluster
from raysae.search import estimate as module
from raysae.search import plan as planning
from raysae.search.cluster import Gpu, NodeRoom, make_plan
from raysae.search.estimate import estimate
from raysae.search.plan import describe_plan, shortages
from raysae.search.run import resolve
from raysae.search.sizes import CorpusSize, corpus_size
from raysae.store.activations import corpus_tokens
from raysae.worlds import load_world
from raysae.worlds.model import load_model
from raysae.worlds.presets import shape_of

SPACES = Path(__file__).parent.parent.parent / "search_spaces"


def config(space: str = "orth.yaml", **overrides: Any) -> RunConfig:
    values = {name.replace("__", "."): value for name, value in overrides.items()}
    return resolve(load_config(SPACES / space, values))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which a step takes 10 ms, and a token 4 µs a layer; 2 cores."""
    monkeypatch.setattr(module, "_seconds_a_step", lambda *_: 0.01)
    layers = 1  # up to the hook of the embedded world
    monkeypatch.setattr(module, "_seconds_a_token", lambda *_: 4e-6 * layers)
    monkeypatch.setattr(module, "START_SECONDS", 0.0)
    monkeypatch.setattr(module, "IMPORTS", 0)
    monkeypatch.setattr("raysae.worlds.model.load_model", lambda *_, **__: None)


SIZE = CorpusSize(sequences=1000, rows=60_000, prompt_tokens=50_000, evaluated=100_000)
MACHINE = {
    "workers": 2,
    "trials_per_pack": 1,
    "workers_here": 2,
    "cores": 2,
    "harvested": True,
}


def test_the_size_of_a_corpus_is_that_of_its_tokens():
    world = load_world("embedded")
    model = load_model(world)
    tokens = corpus_tokens(world, model.tokenizer)
    special = [model.tokenizer.bos_token_id, model.tokenizer.eos_token_id]
    rows = sum(int((~np.isin(part, special)).sum()) for part in tokens.values())
    size = corpus_size(world)
    assert size.sequences == pytest.approx(sum(map(len, tokens.values())), rel=0.03)
    assert size.rows == pytest.approx(rows, rel=0.03)
    # As SAEBench asks them: 45,676 tokens in the evaluation cache of the embedded world.
    assert size.prompt_tokens == pytest.approx(45_676, rel=0.03)


@pytest.mark.usefixtures("measured")
def test_seconds_of_a_search_are_those_of_its_steps_and_rungs():
    made = config(
        search__num_samples=10, search__scheduler={"name": "none"}, training__tokens=1024 * 1000,
        confirm__top=0,
    )  # fmt: skip
    found = estimate(made, shape_of("embedded"), load_world("embedded"), SIZE, **MACHINE)
    assert found.start == 0
    assert found.training == pytest.approx(1000 * 0.01)
    # 16 interventions on a quarter of the positions in the 3 layers behind the hook; and the SAE's
    # encoder, a sixth of a step, over 1000 sequences of 64 and the questions.
    # A trial is three SAEs, which share a step's 10 ms and are scored each.
    encoded = (1000 * 64 + 50_000) / 1024 * 0.01 / 6
    assert found.scoring == pytest.approx(3 * 16 * 50_000 * 4e-6 * 3 * 0.25 + encoded)
    assert found.search == pytest.approx(10 / 2 * (found.training + found.scoring))
    assert found.confirmation == 0


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize(
    ("workers", "seeds_in_turn"),
    # Of three configurations with eight seeds each: all by one worker; by two, four of each; by
    # three, three of each at most; 24 trials of a seed by ten workers are three in turn.
    [(1, 24), (2, 12), (3, 9), (10, 3)],
)
def test_the_confirmation_takes_what_the_busiest_worker_takes(workers: int, seeds_in_turn: int):
    machine = MACHINE | {"workers": workers, "workers_here": 1}
    found = estimate(config(), shape_of("embedded"), load_world("embedded"), SIZE, **machine)
    # The others are trials of three seeds.
    each = (found.training + found.scoring) / 3
    assert found.confirmation == pytest.approx(seeds_in_turn * each)


@pytest.mark.usefixtures("measured")
def test_trials_that_are_stopped_early_cost_less():
    made = config(
        search__num_samples=90, confirm__top=0, training__tokens=1024 * 900,
        search__scheduler={"name": "asha", "grace_fraction": 1 / 9, "reduction_factor": 3},
    )  # fmt: skip
    found = estimate(made, shape_of("embedded"), load_world("embedded"), SIZE, **MACHINE)
    # Rungs at 1/9, 1/3 and 1 of the run; a third goes on at each.
    share, early, last = 1 / 9 + 2 / 9 / 3 + 2 / 3 / 9, 1 + 1 / 3, 1 / 9
    # Before the last one half of the questions is asked, under the same interventions.
    half = found.scoring - 3 * 16 * 25_000 * 4e-6 * 3 * 0.25
    scored = early * half + last * found.scoring
    assert found.search == pytest.approx(45 * (share * found.training + scored))


@pytest.mark.usefixtures("measured")
def test_saebenchs_own_loop_asks_everything_at_every_rung():
    made = config(
        search__num_samples=90, confirm__top=0, objective__evaluator="saebench",
        search__scheduler={"name": "asha", "grace_fraction": 0.5, "reduction_factor": 2},
    )  # fmt: skip
    found = estimate(made, shape_of("embedded"), load_world("embedded"), SIZE, **MACHINE)
    assert found.search == pytest.approx(45 * (0.75 * found.training + 1.5 * found.scoring))


@pytest.mark.usefixtures("measured")
def test_workers_that_outnumber_the_cores_are_no_faster():
    two, four = (
        estimate(config(), shape_of("embedded"), load_world("embedded"), SIZE,
                 **MACHINE | {"workers": n, "workers_here": n})
        for n in (2, 4)
    )  # fmt: skip
    assert four.search == pytest.approx(two.search)
    assert four.training == pytest.approx(2 * two.training)


@pytest.mark.usefixtures("measured")
def test_without_the_model_it_counts_operations_and_says_so():
    made = config("seed_gemma-2-2b.yaml", resources__use_gpu=False)
    found = estimate(made, shape_of("gemma-2-2b"), None, None, **MACHINE)
    assert "the model is not on this machine" in found.measured
    # 16 · 2304² parameters a layer, two operations each, at the speed of the training step.
    rate = 12 * made.training.batch_size * 2304 * made.sae.d_sae / 0.01
    known = 841 * 150  # tokens of the prompts that gemma-2-2b-it knows the answer of
    encoded = (2 * 500 * 1024 + known) * 0.01 / 6 / made.training.batch_size
    layers = 16 * known * (26 - 20) * 0.25 * 2 * 16 * 2304**2 / rate
    assert found.scoring == pytest.approx(layers + encoded)


def test_every_method_of_the_space_is_timed():
    space = config().space
    assert space is not None
    specs = module._one_of_each(config())
    assert [spec.regularizer.name for spec in specs] == list(space.regularizer)
    assert {spec.alpha for spec in specs if spec.regularizer.uses_alpha} == {1.0}


def test_every_method_is_timed_at_both_ends_of_a_searched_size(monkeypatch: pytest.MonkeyPatch):
    made = config(space__sae={"k": [4], "d_sae": {"int": [256, 2048], "log": True}})
    assert made.space is not None
    specs = module._one_of_each(made)
    expected = [(name, d_sae) for name in made.space.regularizer for d_sae in (256, 2048)]
    assert [(spec.regularizer.name, spec.sae.d_sae) for spec in specs] == expected
    monkeypatch.setattr(module, "_time_steps", lambda spec, *_: spec.sae.d_sae / 1000)
    assert module._seconds_a_step(made, 128, "cpu", 1) == pytest.approx((0.256 + 2.048) / 2)


# --- The lines ------------------------------------------------------------------------------------


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    request.getfixturevalue("measured")
    monkeypatch.setattr(planning, "corpus_size", lambda _: SIZE)

    def say(**overrides: Any) -> dict[str, str]:
        found = [line.partition(" ") for line in describe_plan(config(**overrides))]
        return {name: rest.strip() for name, _, rest in found}

    return say


def test_a_plan_has_sizes_by_tier_and_node(lines: Any):
    said = lines(resources__workers=3)
    assert "about 60,000 tokens in 1,000 sequences" in said["corpora"]
    # 60,000 · (128 · 4 + 8) bytes
    assert "in shared memory (29.8 MiB, the object store has room for 716.8 MiB)" in said["store"]
    # 100,000 tokens of the evaluation cache in float32; the activations are there before it.
    room = "the object store has room for 687.0 MiB"
    assert f"evaluation cache in shared memory (49.6 MiB, {room})" in said["scoring"]
    assert "79.3 MiB in " in said["on"]
    node = "this machine: 4 CPUs and 0 GPUs for Ray, object store 1.0 GiB, 79.3 MiB of it used"
    assert said["node"] == node
    assert said["workers"].startswith("3, 1 a trial")
    assert "an estimate" in said["time"]


def test_what_is_larger_than_the_object_store_is_mapped_from_disk(
    lines: Any, monkeypatch: pytest.MonkeyPatch
):
    size = CorpusSize(1, 10_000_000, 1, 100_000)
    monkeypatch.setattr(planning, "corpus_size", lambda _: size)
    gib = {"resources__store_memory": 1 << 30}
    said = lines(**gib)
    assert "mapped from disk (4.8 GiB" in said["store"]
    assert said["node"].endswith(
        ", object store 1.0 GiB, 49.6 MiB of it used, 4.8 GiB mapped from disk"
    )
    assert "object store" not in said.get("short", "")
    said = lines(resources__cache=None, **gib)
    assert "spilled to disk by Ray" in said["store"]
    assert "object store: 4.9 GiB, it has room for 716.8 MiB" in said["short"]
    assert "set resources.store_memory higher" in said["short"]


def test_an_evaluation_cache_for_which_activations_leave_no_room_is_mapped(
    lines: Any, monkeypatch: pytest.MonkeyPatch
):
    size = CorpusSize(1, 1_400_000, 1, 100_000)
    monkeypatch.setattr(planning, "corpus_size", lambda _: size)
    said = lines(resources__store_memory=1 << 30)
    assert "in shared memory (694.3 MiB" in said["store"]
    assert "mapped from disk (49.6 MiB, the object store has room for 22.5 MiB)" in said["scoring"]
    assert said["node"].endswith("694.3 MiB of it used, 49.6 MiB mapped from disk")


@pytest.mark.usefixtures("measured")
def test_nodes_of_a_cluster_that_are_too_small_are_named(monkeypatch: pytest.MonkeyPatch):
    size = CorpusSize(1, 10_000_000, 1, 100_000)
    monkeypatch.setattr(planning, "corpus_size", lambda _: size)
    made = config(resources__workers=6)
    nodes = [
        NodeRoom("large", 4, 0, 16 << 30, 64 << 30),
        NodeRoom("small", 4, 0, 1 << 30, 2 << 30),
        NodeRoom("head", 0, 0, 16 << 30, 1),  # gets no worker
    ]
    plan = make_plan(made, [{"CPU": 8.0}], local=False)
    monkeypatch.setattr(planning, "look", lambda *_: (plan, nodes))
    short = [line for line in describe_plan(made, "auto") if line.startswith("short of ")]
    memory, store = [line for line in short if "of small" in line]
    assert "memory of small: 4 workers take about" in memory and "2.0 GiB are free" in memory
    assert "object store of small: 4.8 GiB, it has room for 716.8 MiB" in store
    assert "`ray start --object-store-memory`" in store
    assert not any("of large" in line or "of head" in line for line in short)


@pytest.mark.usefixtures("measured")
def test_what_does_not_fit_is_named_with_the_setting_to_change(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planning, "corpus_size", lambda _: SIZE)
    monkeypatch.setattr(planning, "_free", lambda _: 1000)
    said = describe_plan(config(resources__workers=1000))
    short = [line for line in said if line.startswith("short of ")]
    for part in (
        "disk for the cache", "set resources.cache", "disk for the run folder", "set --out",
        "memory: 1000 workers", "set resources.workers lower",
    ):  # fmt: skip
        assert any(part in line for line in short), part


def test_the_memory_of_a_pack_is_that_of_its_saes(lines: Any, monkeypatch: pytest.MonkeyPatch):
    memory = planning.psutil.virtual_memory()._replace(available=2 << 30)
    monkeypatch.setattr(planning.psutil, "virtual_memory", lambda: memory)
    said = lines(resources__workers=1, resources__trials_per_pack=2)
    # 131,712 parameters, their gradients and moments; six times 1024 rows of 128 + 512.
    each = 4 * 4 * 131_712 + 6 * 4 * 1024 * (128 + 512)
    assert said["packs"].startswith("6 SAEs trained together by a worker: 2 trials of 3 seeds; ")
    assert f"{each / 2**20:.1f} MiB each" in said["packs"]
    model = load_world("embedded").model_path
    parameters = 4 * sum(
        t.numel() for f in model.glob("*.safetensors") for t in load_file(f).values()
    )
    room = (2 << 30) - planning.PROCESS_BYTES - parameters
    trials = (room - 4 * 512**2) // (8 * each)  # the confirmation's seeds are more
    assert f"{room / 2**30:.1f} GiB have room for {8 * trials}" in said["packs"]
    assert "2 trials at a time" in said["workers"]


def test_a_gpu_that_is_too_small_is_named(lines: Any, monkeypatch: pytest.MonkeyPatch):
    gpus = [Gpu("small", 1 << 20)]
    monkeypatch.setattr(planning, "list_gpus", lambda: gpus)
    monkeypatch.setattr("raysae.search.cluster.list_gpus", lambda: gpus)
    said = lines(resources__use_gpu=True)
    assert "1.0 MiB" not in said["a"]
    assert said["workers"].startswith("1, ")
    assert "set sae.d_sae or training.batch_size lower" in said["short"]
    assert "have room for 0" in said["packs"] and "1 trial of" in said["packs"]


def test_a_search_says_before_it_starts_what_it_will_be_short_of(monkeypatch):
    memory = SimpleNamespace(available=8 << 30, total=8 << 30)
    monkeypatch.setattr(cluster.psutil, "virtual_memory", lambda: memory)
    world = load_world("embedded")
    (short,) = [x for x in shortages(config(resources__workers=64), world) if "memory" in x]
    assert re.match(r"memory: 64 workers take about [\d.]+ GiB, 8.0 GiB are free; set ", short)
    assert [x for x in shortages(config(resources__workers=2), world) if "memory" in x] == []
