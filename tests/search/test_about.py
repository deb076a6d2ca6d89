"""What a session writes of itself: a later one cannot go on without it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from raysae.config import find_space, load_config
from raysae.search import about as module
from raysae.search.about import add_plan, write_about
from raysae.search.cluster import Plan
from raysae.search.integrity import record_store
from raysae.search.run import load_run, resolve
from raysae.store import files
from raysae.store.handle import HeldChunk, StoreHandle
from raysae.worlds.world import load_world

PLAN = Plan(
    workers=1, max_workers=1, workers_per_trial=1, trials_per_pack=1, concurrent_trials=1,
    cpus=1, gpus=0, local=True,
)  # fmt: skip


def write(run_dir: Path, started: float) -> str:
    config = resolve(load_config(find_space("orth.yaml")))
    said = write_about(config, run_dir, load_world(config.world), started)
    add_plan(run_dir, replace(PLAN, workers=int(started)))
    return said


def test_a_later_session_adds_itself(tmp_path: Path):
    write(tmp_path, 1.0)
    first = json.loads((tmp_path / "about.json").read_text())
    write(tmp_path, 2.0)
    second = json.loads((tmp_path / "about.json").read_text())
    assert [session["started"] for session in second["sessions"]] == [1.0, 2.0]
    assert second | {"sessions": None} == first | {"sessions": None}
    assert first["plan"]["workers"] == 1


def test_a_session_that_ends_while_it_writes_leaves_what_there_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write(tmp_path, 1.0)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:20])
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "sync", cut)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 2.0)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    load_run(tmp_path)


def test_what_has_changed_since_a_search_began_is_said_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "_git_commit", lambda: "a" * 40)
    assert write(tmp_path, 1.0) == ""
    assert write(tmp_path, 2.0) == ""
    monkeypatch.setattr(module, "_git_commit", lambda: "b" * 40)
    monkeypatch.setattr(module, "version", lambda _: "9.9")
    other = None if module.compiled.library else "other"
    monkeypatch.setattr(module.compiled, "library", other)
    said = write(tmp_path, 3.0)
    assert re.search("layers (PyTorch, then compiled for|compiled for .*, then PyTorch)", said)
    assert f"commit {'b' * 40}, then {'a' * 40}" in said
    about = json.loads((tmp_path / "about.json").read_text())
    assert f"torch 9.9, then {about['versions']['torch']}" in said
    assert "python" not in said
    first, _, last = about["sessions"]
    assert (first["git_commit"], last["git_commit"]) == ("a" * 40, "b" * 40)
    assert last["versions"]["torch"] == "9.9" != about["versions"]["torch"]
    assert about["git_commit"] == "a" * 40


def test_a_folder_of_an_earlier_version_that_said_less_is_gone_on_with(tmp_path: Path):
    (tmp_path / "about.json").write_text('{"sessions": [], "started": "", "versions": {}}')
    assert write(tmp_path, 1.0) == ""


def test_other_activations_than_a_search_began_with_are_said_and_kept(tmp_path: Path):
    def handle(*sums: str) -> StoreHandle:
        chunks = tuple(HeldChunk(Path("chunk"), None, of_chunk) for of_chunk in sums)
        return StoreHandle(chunks, np.zeros(2048, bool), {}, None, 0)

    first, other = handle("aa", "bb"), handle("aa", "bc")
    write(tmp_path, 1.0)
    assert record_store(tmp_path, first, "2 of 2 chunks harvested, 1 at a time on cpu") == ""
    write(tmp_path, 2.0)
    assert record_store(tmp_path, first, "from the cache") == ""
    write(tmp_path, 3.0)
    said = record_store(tmp_path, other, "2 of 2 chunks harvested, 1 at a time on cuda:0")
    assert f"store {other.digest[:12]} of 2,048 rows (2 of 2 chunks harvested, 1 at" in said
    assert said.index("on cuda:0") < said.index(f"then store {first.digest[:12]}")
    about = json.loads((tmp_path / "about.json").read_text())
    assert about["store"]["sha256"] == first.digest
    kept = [session["store"]["sha256"] for session in about["sessions"]]
    assert kept == [first.digest, first.digest, other.digest]
    assert handle("bb", "aa").digest != first.digest  # the order of rows belongs to it
