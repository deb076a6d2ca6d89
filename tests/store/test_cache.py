"""Entries of the cache: found by what decides the numbers, whole or not there."""

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from raysae.store import cache as cache_module
from raysae.store.cache import MANIFEST, Entry, activations_key, cache_folder, evaluation_key
from raysae.store.chunks import Chunk, Moments, Piece
from raysae.store.entries import (
    check_room,
    list_chunks,
    load_chunk,
    load_evaluation,
    save_chunk,
    save_evaluation,
)
from raysae.store.files import CorruptFileError
from raysae.worlds import World, load_world

HOOK = "blocks.0.hook_resid_post"
PIECES = [Piece("forget", 0, 4), Piece("forget", 4, 6), Piece("retain", 0, 3)]


def make_chunk(piece: Piece, noise: int = 0) -> Chunk:
    rng = np.random.default_rng([piece.start, piece.stop, noise])
    acts = rng.standard_normal((40, 8)).astype(np.float32)
    tokens, positions = rng.integers(0, 99, (2, 40)).astype(np.int32)
    return Chunk(acts, tokens, positions, Moments(40, acts.sum(0, np.float64), 1 / 3, noise + 0.1))


def write_all(entry: Entry, noise: int = 0) -> None:
    records = [save_chunk(entry, piece, make_chunk(piece, noise), "float32") for piece in PIECES]
    entry.publish(records, {})


def read_all(entry: Entry) -> dict[Piece, Chunk]:
    return {piece: load_chunk(entry, record) for piece, record in list_chunks(entry).items()}


def assert_equal(chunk: Chunk, wanted: Chunk) -> None:
    for name in ("activations", "tokens", "positions"):
        np.testing.assert_array_equal(getattr(chunk, name), getattr(wanted, name))
    for name, value in vars(wanted.moments).items():
        np.testing.assert_array_equal(getattr(chunk.moments, name), value)


@pytest.fixture
def entry(tmp_path: Path) -> Entry:
    return Entry.at(tmp_path, "activations", {"hook": HOOK})


@pytest.fixture
def world(tmp_path: Path) -> World:
    """The embedded world with a model folder that may be changed."""
    world = load_world("embedded")
    shutil.copytree(world.model_path, tmp_path / "model")
    return dataclasses.replace(world, model_path=tmp_path / "model")


def test_chunks_come_back_in_their_order_with_all_that_belongs_to_them(entry: Entry):
    assert list_chunks(entry) == {}
    write_all(entry)
    found = read_all(entry)
    assert list(found) == PIECES
    for piece, chunk in found.items():
        assert_equal(chunk, make_chunk(piece))


def test_an_entry_without_its_manifest_is_not_there(entry: Entry):
    for piece in PIECES:
        save_chunk(entry, piece, make_chunk(piece), "float32")
    assert list_chunks(entry) == {}


def test_arrays_and_facts_of_an_evaluation_come_back(entry: Entry):
    assert load_evaluation(entry) is None
    arrays = {"forget.counts": np.arange(12).reshape(3, 4) % 3 == 0, "prompts.ids": np.arange(5)}
    facts = {".dtype": "float32", ".config": {"a": [0.1, 1e-300], "b": None}}
    written = save_evaluation(entry, (arrays, facts))
    found = load_evaluation(entry)
    assert found is not None
    record, (arrays_again, facts_again) = found
    assert (record, facts_again) == (written, facts)
    for name, array in arrays.items():
        np.testing.assert_array_equal(arrays_again[name], array)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda _: "",
        lambda _: "[]",
        lambda text: text.replace('"start": 4', '"start": 5'),
        lambda text: json.dumps(json.loads(text) | {"sha256": "0"}),
    ],
)
def test_a_manifest_that_was_changed_is_named(entry: Entry, damage):
    write_all(entry)
    path = entry.folder / MANIFEST
    path.write_text(damage(path.read_text()))
    with pytest.raises(CorruptFileError, match=str(path)):
        list_chunks(entry)


def test_a_manifest_of_another_key_is_not_taken_for_ours(entry: Entry):
    write_all(entry)
    other = dataclasses.replace(entry, key={"hook": "another"})
    with pytest.raises(CorruptFileError, match="another key"):
        list_chunks(other)


def test_whatever_decides_the_activations_decides_the_key(world: World, monkeypatch):
    keys = [activations_key(world, HOOK, "float32")]
    keys.append(activations_key(world, "blocks.1.hook_resid_post", "float32"))
    keys.append(activations_key(world, HOOK, "bfloat16"))
    for change in (
        {"forget_texts": world.forget_texts[1:]},
        {"retain_texts": world.retain_texts[::-1]},
        {"seq_len": 63},
    ):
        keys.append(activations_key(dataclasses.replace(world, **change), HOOK, "float32"))
    weights = world.model_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    keys.append(activations_key(world, HOOK, "float32"))
    monkeypatch.setattr(cache_module, "version", lambda _: "0.0.1")
    keys.append(activations_key(world, HOOK, "float32"))
    assert len({json.dumps(key, sort_keys=True) for key in keys}) == len(keys) == 8


def test_where_the_model_lies_and_the_questions_do_not_decide_it(world: World):
    key = activations_key(load_world("embedded"), HOOK, "float32")
    assert activations_key(world, HOOK, "float32") == key
    few = {name: questions[:1] for name, questions in world.questions.items()}
    asked_less = dataclasses.replace(world, questions=few)
    assert activations_key(asked_less, HOOK, "float32") == key
    assert evaluation_key(asked_less, HOOK) != evaluation_key(world, HOOK)
    assert evaluation_key(world, HOOK) == evaluation_key(load_world("embedded"), HOOK)


def test_the_folder_is_the_users_own_unless_set(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAYSAE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder("auto") == tmp_path / ".cache/raysae"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder("auto") == tmp_path / "xdg/raysae"
    monkeypatch.setenv("RAYSAE_CACHE", "~/mine")
    assert cache_folder("auto") == tmp_path / "mine"
    assert cache_folder("~/other") == tmp_path / "other"
    assert cache_folder(None) is None


def test_room_is_looked_for_before_writing(tmp_path: Path):
    check_room(tmp_path / "not/there/yet", 1)
    with pytest.raises(OSError, match="No space left"):
        check_room(tmp_path / "not/there/yet", 1 << 60)


def _write_repeatedly(entry: Entry, noise: int, times: int) -> None:
    for _ in range(times):
        write_all(entry, noise)


def test_who_writes_the_same_entry_at_once_leaves_one_that_is_whole(entry: Entry):
    """Two writers whose numbers differ, the worst case, and a reader beside them."""
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_repeatedly, args=(entry, i, 40)) for i in (0, 1)]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        for piece, chunk in read_all(entry).items():
            noise = round(chunk.moments.norm2 - 0.1)
            seen.add(noise)
            assert_equal(chunk, make_chunk(piece, noise))
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    found = read_all(entry)
    noises = {round(chunk.moments.norm2 - 0.1) for chunk in found.values()}
    assert list(found) == PIECES
    assert len(noises) == 1
    assert seen <= {0, 1}


KILLED = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_cache import HOOK, Entry, write_all
entry = Entry.at(Path(sys.argv[1]), "activations", {"hook": HOOK})
print("writing", flush=True)
noise = 1
while True:
    write_all(entry, noise)
    noise += 1
"""


def test_a_writer_that_is_killed_leaves_a_whole_entry(entry: Entry, tmp_path: Path):
    write_all(entry)
    for delay in (0.0, 0.011, 0.023):
        command = [sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parent)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(delay)
            os.kill(writer.pid, signal.SIGKILL)
        found = read_all(entry)
        assert list(found) == PIECES
        assert len({round(chunk.moments.norm2 - 0.1) for chunk in found.values()}) == 1
