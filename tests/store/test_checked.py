"""Checksums on every machine: once where nothing has changed, and never not at all."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from synthetic_store import put_store

from raysae.search.integrity import check_store
from raysae.store import files
from raysae.store.checked import check_once, has_been_checked, map_checked
from raysae.store.chunks import Moments
from raysae.store.copies import compare_copies
from raysae.store.files import CorruptFileError, checksum, write_tensors
from raysae.store.handle import CorruptCopyError, HeldChunk, StoreHandle
from raysae.store.mapped import MappedFile

pytestmark = pytest.mark.ray
VALUES = np.arange(1000, dtype=np.float32)
SUMS = {"x": checksum(VALUES)}


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=1,
        object_store_memory=200 << 20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "entry" / "values.safetensors"
    write_tensors(path, {"x": VALUES})
    return path


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the bytes of every array that is hashed."""
    sizes: list[int] = []

    def counted(array: np.ndarray) -> str:
        sizes.append(array.nbytes)
        return checksum(array)

    monkeypatch.setattr(files, "checksum", counted)
    return sizes


def flip(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[-100] ^= 4
    path.write_bytes(whole)


@pytest.mark.usefixtures("session")
def test_a_file_is_hashed_once_until_it_is_written_to(file: Path, hashed: list[int]):
    for _ in range(3):
        np.testing.assert_array_equal(map_checked(file, SUMS)["x"], VALUES)
    assert hashed == [VALUES.nbytes]
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    map_checked(file, SUMS)
    assert hashed == [VALUES.nbytes] * 2
    flip(file)
    for _ in range(2):  # what was found damaged is not remembered as anything else
        with pytest.raises(CorruptFileError, match=r"values.safetensors: tensor 'x' is not what"):
            map_checked(file, SUMS)
    with pytest.raises(CorruptFileError, match="no tensor 'y'"):
        map_checked(file, SUMS | {"y": ""})


@pytest.mark.usefixtures("session")
def test_what_the_driver_has_just_looked_at_is_not_hashed_again(file: Path, hashed: list[int]):
    has_been_checked(file, SUMS)
    map_checked(file, SUMS)
    assert hashed == []
    with pytest.raises(CorruptFileError):
        map_checked(file, {"x": "another"})


@pytest.mark.usefixtures("session")
def test_without_a_place_to_remember_every_opening_is_a_check(
    file: Path, hashed: list[int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    for _ in range(2):
        map_checked(file, SUMS)
    assert len(hashed) == 2


@ray.remote(num_cpus=0)
def _check_slowly(log: str) -> None:
    def check() -> None:
        with Path(log).open("a") as file:
            file.write("begun ")
        time.sleep(0.5)

    check_once(log, check)


@pytest.mark.usefixtures("session")
def test_of_several_processes_one_checks_and_the_others_wait(tmp_path: Path):
    log = str(tmp_path / "log")
    ray.get([_check_slowly.remote(log) for _ in range(3)])
    assert Path(log).read_text() == "begun "


@pytest.mark.usefixtures("session")
def test_a_damaged_file_of_this_node_is_not_mapped(file: Path):
    node = ray.get_runtime_context().get_node_id()
    assert list(MappedFile(file, node, SUMS).open()) == ["x"]
    flip(file)
    with pytest.raises(CorruptFileError, match=r"values.safetensors"):
        MappedFile(file, node, SUMS).open()


@pytest.mark.usefixtures("session")
def test_a_damaged_copy_is_sent_again(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(Path, "is_file", lambda self: self != file and self.exists())
    monkeypatch.setenv("RAYSAE_CACHE", str(tmp_path / "node"))
    mapped = MappedFile(file, ray.get_runtime_context().get_node_id(), SUMS)
    mapped.open()
    (copy,) = (tmp_path / "node").rglob("*.safetensors")
    flip(copy)
    np.testing.assert_array_equal(mapped.open()["x"], VALUES)
    assert copy.read_bytes() == file.read_bytes()
    assert str(copy) in caplog.text and "sent again" in caplog.text


@pytest.mark.usefixtures("session")
def test_every_copy_is_compared_and_what_has_changed_is_named(tmp_path: Path):
    store = put_store("float32", chunks=3)
    compared = compare_copies(store)
    assert (compared.copies, compared.nodes, compared.problems) == (3, 1, ())
    other = replace(store.chunks[1], place=store.chunks[2].place)
    changed = replace(store, chunks=(store.chunks[0], other))
    assert changed.digest != store.digest
    said, problem = check_store(store)
    assert f"Store unchanged: {store.digest[:12]} (3 copies of 3 chunks on 1 node" in said
    assert problem == ""
    said, problem = check_store(changed)
    assert said == ""
    assert "the store has changed" in problem and "1 of 2 copies" in problem
    (problem,) = compare_copies(changed).problems
    assert other.sha256[:12] in problem and store.chunks[2].sha256[:12] in problem

    path = tmp_path / "chunk.safetensors"
    write_tensors(path, {"activations": VALUES})
    on_disk = replace(store, chunks=(replace(other, place=path, sha256=SUMS["x"]),))
    assert compare_copies(on_disk).problems == ()
    flip(path)
    (problem,) = compare_copies(on_disk).problems
    assert str(path) in problem


ROWS, WIDTH = 4096, 64


@ray.remote(num_cpus=0, max_retries=3)
def _harvested(value: str) -> np.ndarray:
    """Depends on where it runs, as last digits do."""
    return np.full((ROWS, WIDTH), float(Path(value).read_text()), np.float32)


@pytest.mark.parametrize("again", ["1.0", "1.0000001"])
def test_chunks_that_ray_computed_again_otherwise_are_not_trained_on(tmp_path: Path, again: str):
    ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=100 << 20) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        cluster.wait_for_nodes()
        value = tmp_path / "value"
        value.write_text("1.0")
        there = NodeAffinitySchedulingStrategy(nodes[0].node_id, soft=True)
        chunk = _harvested.options(scheduling_strategy=there).remote(str(value))
        ray.wait([chunk], fetch_local=False)
        values = np.ones((ROWS, WIDTH), np.float32)
        held = HeldChunk(chunk, ray.put(np.zeros((2, ROWS), np.int32)), checksum(values))
        moments = Moments(ROWS, values.sum(0, np.float64), ROWS * 8.0, ROWS * 64.0)
        store = StoreHandle((held,), np.zeros(ROWS, bool), {"all": moments}, None, values.nbytes)
        compared = compare_copies(store)  # where it lies: nothing is brought here
        assert (compared.copies, compared.nodes, compared.problems) == (1, 1, ())
        assert compare_copies(store).copies == 1

        value.write_text(again)
        cluster.remove_node(nodes[0], allow_graceful=False)
        if again == "1.0":
            assert store.open().batch(0, 0, 8)[0].shape == (8, WIDTH)
        else:
            with pytest.raises(CorruptCopyError, match=f"place of {held.sha256[:12]}: 1 of 1"):
                store.open()
    finally:
        ray.shutdown()
        cluster.shutdown()
