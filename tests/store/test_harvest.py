"""A harvest through Ray: right rows, found again without a task, and what damage or lack does."""

import hashlib
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from raysae.config import load_config
from raysae.search.run import resolve
from raysae.search.sizes import corpus_size, store_size
from raysae.store import mapped, tiers
from raysae.store.activations import corpus_tokens, local_store
from raysae.store.batches import ChunkedActivations
from raysae.store.cache import MANIFEST
from raysae.store.files import CorruptFileError, map_tensors
from raysae.store.handle import StoreHandle
from raysae.store.harvest import Harvest, harvest
from raysae.store.mapped import MappedFile
from raysae.training.run import SAERun
from raysae.unlearning import EvaluationCache
from raysae.worlds import load_world
from raysae.worlds.model import load_model

pytestmark = pytest.mark.ray
ORTH = Path(__file__).parent.parent.parent / "search_spaces" / "orth.yaml"
HOOKS = ["blocks.0.hook_resid_post", "blocks.2.hook_resid_post"]
QUIET = {
    "address": "local",
    "include_dashboard": False,
    "log_to_driver": False,
    "logging_level": "ERROR",
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("raysae")


@pytest.fixture(scope="module")
def first(cache: Path) -> Iterator[Harvest]:
    """Ray, and both hooks, harvested into an empty cache."""
    ray.init(num_cpus=2, object_store_memory=300 << 20, **QUIET)
    result = harvest("embedded", HOOKS, "float32", evaluation_cache=False, cache=cache)
    result.lines += result.finish()
    yield result
    ray.shutdown()


def again(cache: Path | None, hooks: list[str] = HOOKS) -> Harvest:
    return harvest("embedded", hooks, "float32", evaluation_cache=False, cache=cache)


def digest(store: StoreHandle) -> list[str]:
    return [hashlib.sha256(array.tobytes()).hexdigest() for array in store.arrays()]


def files_of(cache: Path, hook_name: str) -> list[Path]:
    """The chunks of a hook's entry, in the order of their names."""
    (manifest,) = [p for p in cache.glob(f"activations/*/{MANIFEST}") if hook_name in p.read_text()]
    return sorted(manifest.parent.glob("*.safetensors"))


def assert_same(store: StoreHandle, wanted: StoreHandle) -> None:
    assert digest(store) == digest(wanted) == [chunk.sha256 for chunk in store.chunks]
    ours, theirs = store.open(), wanted.open()
    assert (ours.scale, ours.variance) == (theirs.scale, theirs.variance)
    for a, b in zip(ours.batch(1, 2, 512), theirs.batch(1, 2, 512), strict=True):
        assert torch.equal(a, b)
    rows = np.arange(0, store.rows, 1009)
    for name, values in store.origin(rows).items():
        np.testing.assert_array_equal(values, wanted.origin(rows)[name])


def test_the_rows_are_those_of_a_plain_loop_at_every_hook(first: Harvest):
    world = load_world("embedded")
    model = load_model(world)
    for hook_name in HOOKS:
        wanted = local_store(world, model, hook_name)
        rows = np.concatenate(first.stores[hook_name].arrays())
        np.testing.assert_array_equal(rows, np.concatenate(wanted._chunks))
        store = first.stores[hook_name].open()
        assert store.scale == pytest.approx(wanted.scale, rel=1e-14)
        assert store.variance == pytest.approx(wanted.variance, rel=1e-12)
        np.testing.assert_array_equal(store._is_forget, wanted._is_forget)


def test_every_row_knows_the_token_that_it_came_from(first: Harvest):
    world = load_world("embedded")
    model = load_model(world)
    tokens = corpus_tokens(world, model.tokenizer)
    store = first.stores[HOOKS[0]]
    origin = store.origin(np.arange(store.rows))
    special = {model.tokenizer.bos_token_id, model.tokenizer.eos_token_id}
    special.add(model.tokenizer.pad_token_id)
    for name, corpus in tokens.items():
        own = origin["corpus"] == name
        positions = origin["positions"][own]
        np.testing.assert_array_equal(origin["tokens"][own], corpus.flatten()[positions])
        counted = np.flatnonzero(~np.isin(corpus.flatten(), list(special)))
        np.testing.assert_array_equal(positions, counted)


def test_the_next_search_finds_all_of_it(first: Harvest, cache: Path):
    found = again(cache)
    assert all("from the cache" in line for line in found.lines)
    assert found.finish() == []
    for name in HOOKS:
        assert_same(found.stores[name], first.stores[name])


WITHOUT_TASKS = """
import sys
import ray
from pathlib import Path
from raysae.store import harvest as module
for task in ("tokenize", "harvest_piece", "evaluation_cache"):
    delattr(module.tasks, task)
ray.init("local", num_cpus=0, object_store_memory=300 << 20, include_dashboard=False)
hook = "blocks.0.hook_resid_post"
store = module.harvest(
    "embedded", [hook], "float32", evaluation_cache=False, cache=Path(sys.argv[1])
).stores[hook]
heavy = {"torch", "transformers", "transformer_lens", "sae_lens", "sae_bench"} & set(sys.modules)
print(store.rows, sorted(heavy), *(chunk.sha256 for chunk in store.chunks))
ray.shutdown()
"""


def test_what_is_found_needs_no_task_and_no_torch(first: Harvest, cache: Path):
    """In a process that has no tasks to submit."""
    command = [sys.executable, "-c", WITHOUT_TASKS, str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    store = first.stores[HOOKS[0]]
    wanted = [str(store.rows), "[]", *(chunk.sha256 for chunk in store.chunks)]
    assert done.stdout.split() == wanted, done.stderr


@pytest.mark.parametrize("damage", ["bit", "truncated", "gone"])
def test_a_damaged_file_is_named_and_harvested_again(first: Harvest, cache: Path, damage: str):
    path = files_of(cache, HOOKS[1])[2]
    whole = path.read_bytes()
    if damage == "bit":
        path.write_bytes(whole[:-1000] + bytes([whole[-1000] ^ 4]) + whole[-999:])
    elif damage == "truncated":
        path.write_bytes(whole[:-1])
    else:
        path.unlink()
    found = again(cache)
    named, *stores = found.lines
    assert str(path) in named
    assert "harvesting it again" in named
    assert "from the cache" in stores[0]
    assert "1 of 4 chunks harvested" in stores[1]
    for name in HOOKS:
        assert_same(found.stores[name], first.stores[name])
    assert "written to" in found.finish()[0]
    assert path.read_bytes() == whole


def test_a_damaged_manifest_is_named_and_the_store_harvested_again(first: Harvest, cache: Path):
    manifest = files_of(cache, HOOKS[1])[0].parent / MANIFEST
    whole = manifest.read_text()
    manifest.write_text(whole[:-30])
    found = again(cache, HOOKS[1:])
    assert str(manifest) in found.lines[0]
    assert_same(found.stores[HOOKS[1]], first.stores[HOOKS[1]])
    found.finish()
    assert manifest.read_text() == whole


def test_a_cache_that_cannot_be_written_costs_the_search_nothing(first: Harvest, tmp_path: Path):
    (tmp_path / "file").touch()
    blocked = again(tmp_path / "file" / "cache", HOOKS[:1])
    assert_same(blocked.stores[HOOKS[0]], first.stores[HOOKS[0]])
    (line,) = blocked.finish()
    assert "cannot be written" in line
    assert "goes on without it" in line


def test_a_disk_that_fills_up_costs_the_search_nothing(first: Harvest, tmp_path: Path):
    found = again(tmp_path, HOOKS[:1])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        (line,) = found.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(tmp_path) in line
    assert "cannot be written" in line
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert_same(found.stores[HOOKS[0]], first.stores[HOOKS[0]])
    assert "written to" in found.finish()[0]  # with room again


def test_without_a_cache_nothing_is_written(first: Harvest):
    found = again(None, HOOKS[:1])
    assert found.finish() == []
    assert_same(found.stores[HOOKS[0]], first.stores[HOOKS[0]])


def test_a_store_larger_than_the_object_store_is_mapped_from_disk(
    first: Harvest, cache: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(tiers, "MEMORY_SHARE", 0.0)
    for folder in (cache, tmp_path):  # found there, and harvested to there
        found = again(folder, HOOKS[:1])
        store = found.stores[HOOKS[0]]
        assert "mapped from disk" in found.lines[-1]
        assert all(isinstance(chunk.place, Path) for chunk in store.chunks)
        assert_same(store, first.stores[HOOKS[0]])
        found.finish()
    assert "from the cache" in again(tmp_path, HOOKS[:1]).lines[-1]


@pytest.mark.usefixtures("first")
@pytest.mark.parametrize("mapped", [False, True])
def test_nobody_can_write_to_the_chunks_and_training_does_not(
    cache: Path, mapped: bool, make_spec, monkeypatch
):
    if mapped:
        monkeypatch.setattr(tiers, "MEMORY_SHARE", 0.0)
    store = again(cache, HOOKS[:1]).stores[HOOKS[0]]
    for array in store.arrays():
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 1
    before = digest(store)
    source: ChunkedActivations = store.open()
    run = SAERun(make_spec(batch_size=512), source)
    for _ in range(3):
        run.advance()
    batch, _ = source.batch(0, 0, 512)
    batch.zero_()
    assert digest(store) == before == [chunk.sha256 for chunk in store.chunks]


def test_a_node_that_lacks_a_file_is_sent_it_once_and_whole(
    first: Harvest, cache: Path, tmp_path: Path, monkeypatch
):
    path = files_of(cache, HOOKS[0])[0]
    with_checksums = {"activations": first.stores[HOOKS[0]].chunks[0].sha256}
    node = ray.get_runtime_context().get_node_id()
    file = MappedFile(path, node, with_checksums)
    wanted = map_tensors(path)
    # As on another machine: this process does not see the file, the task that reads it does.
    monkeypatch.setattr(Path, "is_file", lambda self: self != path and self.exists())
    monkeypatch.setenv("RAYSAE_CACHE", str(tmp_path))
    monkeypatch.setattr(mapped, "PIECE_BYTES", 1 << 20)
    for name, array in file.open().items():
        np.testing.assert_array_equal(array, wanted[name])
    (copy,) = tmp_path.rglob(path.name)
    assert copy.read_bytes() == path.read_bytes()
    copied = copy.stat()
    file.open()
    assert copy.stat() == copied

    copy.unlink()
    with pytest.raises(CorruptFileError, match="is not what was written"):
        replace(file, checksums={"activations": "0"}).open()
    assert list(tmp_path.rglob("*.safetensors")) == []


@ray.remote(num_cpus=0)
def _try_to_write(refs: list[ray.ObjectRef]) -> str:
    array = ray.get(refs[0])
    try:
        array[0, 0] = 1
    except ValueError as error:
        return str(error)
    return "written"


def test_another_process_cannot_write_to_them_either(first: Harvest):
    chunk = first.stores[HOOKS[0]].chunks[0]
    assert "read-only" in ray.get(_try_to_write.remote([chunk.place]))


@pytest.mark.slow
def test_an_evaluation_cache_without_room_is_mapped_from_its_file(tmp_path: Path, monkeypatch):
    ray.shutdown()
    ray.init(num_cpus=2, object_store_memory=300 << 20, **QUIET)
    hook, world = HOOKS[0], load_world("embedded")

    def opened() -> tuple[EvaluationCache, str]:
        found = harvest("embedded", [hook], "float32", evaluation_cache=True, cache=tmp_path)
        lines = found.lines + found.finish()
        (said,) = [line for line in lines if line.startswith("evaluation cache: ")]
        return found.stores[hook].open_evaluation_cache(), said

    with monkeypatch.context() as no_room:
        no_room.setattr(tiers, "MEMORY_SHARE", 0.0)
        computed, said_computed = opened()
        again, said_again = opened()
    assert "mapped from disk" in said_computed and "computed in" in said_computed
    assert "mapped from disk" in said_again and "from the cache" in said_again
    shared, said_shared = opened()
    assert "in shared memory" in said_shared
    (file,) = tmp_path.glob("evaluation/*/*.safetensors")
    on_disk, in_memory = again.to_plain(), shared.to_plain()
    assert on_disk[1] == in_memory[1] == computed.to_plain()[1]
    for name, array in map_tensors(file).items():
        for cache in (computed, again, shared):
            np.testing.assert_array_equal(cache.to_plain()[0][name], array)
        assert not on_disk[0][name].flags.writeable
    size = store_size(resolve(load_config(ORTH)), world, corpus_size(world))
    assert size.evaluation == pytest.approx(computed.nbytes, rel=0.05)
    ray.shutdown()
