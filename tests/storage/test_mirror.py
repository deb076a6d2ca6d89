"""A copy of a run folder is one that a search can go on from, whatever became of the first."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from small_s3 import Store, serving

from raysae.errors import UserError
from raysae.journal import JOURNAL
from raysae.search import mirror
from raysae.search.mirror import Mirror, mirroring, read_together
from raysae.search.study import STUDY_FILE
from raysae.storage import MANIFEST, Location, address_of, fetch, find_copy, locate, public, reserve
from raysae.training.checkpoint import CHECKPOINT_FILE

LINE = b'{"event": "start", "trial": 0}\n'
COPIED = {
    "config.yaml": b"seed: 0\n",
    "about.json": b"{}",
    "trials/0000/sae/sae_weights.safetensors": b"weights",
    "trials/0001/checkpoint.pt": b"state",
    "journal.jsonl": LINE,
    "optuna.journal": b"{}\n",
}
NOT_COPIED = ("lock", "status.json", "pool/x/state", "tune/y.pkl", "trials/0001/checkpoint.partial")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run folder in the middle of a search: trial 0 has ended, trial 1 is in flight."""
    folder = tmp_path / "run"
    for name, data in COPIED.items() | dict.fromkeys(NOT_COPIED, b"of this machine").items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


@pytest.fixture
def copies(tmp_path: Path) -> Location:
    """A place in a folder of this machine."""
    return locate("--storage", f"file://{tmp_path}/copies", "run")


@pytest.fixture
def s3() -> Iterator[Store]:
    with serving() as store:
        yield store


@pytest.fixture
def bucket(s3: Store) -> Location:
    return reserve("--storage", f"{s3.address}/pre{s3.query}", "run", new=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def without_manifest(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name != MANIFEST}


# --- The copy -------------------------------------------------------------------------------------


def test_everything_that_another_machine_needs_is_copied_and_nothing_else(run_dir, copies):
    Mirror(run_dir, copies).sync()
    assert without_manifest(contents(Path(copies.root))) == COPIED
    manifest = json.loads((Path(copies.root) / MANIFEST).read_text())
    assert manifest == {"address": copies.address, "journals": {JOURNAL: 31, STUDY_FILE: 3}}


def test_names_are_those_that_are_used_elsewhere():
    assert (mirror.CHECKPOINT, mirror.OPTUNA_JOURNAL) == (CHECKPOINT_FILE, STUDY_FILE)


def test_only_what_has_changed_is_sent_to_s3(run_dir, s3, bucket):
    kept = Mirror(run_dir, bucket)
    kept.sync()
    objects = {k.removeprefix("pre/run/"): v for k, v in s3.objects.items() if k[-1] != "/"}
    assert without_manifest(objects) == COPIED

    def sent() -> list[str]:
        s3.puts.clear()
        kept.sync()
        return [name.removeprefix("pre/run/") for name in s3.puts if name[-1] != "/"]

    assert sent() == []
    (run_dir / "about.json").write_bytes(b"[]")  # as long as before
    assert sent() == ["about.json"]
    with (run_dir / JOURNAL).open("ab") as file:
        file.write(LINE)
    (run_dir / "trials/0001/checkpoint.pt").write_bytes(b"later")
    assert sent() == [JOURNAL, STUDY_FILE, MANIFEST, "trials/0001/checkpoint.pt"]
    for path in run_dir.rglob("*"):
        os.utime(path, (0, 0))  # changed well before it was sent: S3 keeps whole seconds
    kept = Mirror(run_dir, bucket)  # another session
    assert set(sent()) <= {JOURNAL, STUDY_FILE, MANIFEST}


def test_what_is_gone_from_the_folder_is_gone_from_the_copy(run_dir, bucket):
    kept = Mirror(run_dir, bucket)
    kept.sync()
    (run_dir / "trials/0001/checkpoint.pt").unlink()
    kept.sync()
    assert bucket.names().keys() == (COPIED.keys() | {MANIFEST}) - {"trials/0001/checkpoint.pt"}
    (run_dir / "about.json").unlink()
    Mirror(run_dir, bucket).sync()  # another session
    assert "about.json" not in bucket.names()


def test_a_journal_is_copied_in_whole_lines(run_dir, copies):
    with (run_dir / JOURNAL).open("ab") as file:
        file.write(b'{"event": "en')
    Mirror(run_dir, copies).sync()
    assert (Path(copies.root) / JOURNAL).read_bytes() == LINE


def test_journals_are_read_as_they_were_at_one_moment(run_dir, monkeypatch):
    """The other is written to between the reading of the first and its own, once."""
    paths = [run_dir / JOURNAL, run_dir / STUDY_FILE]
    read_bytes, written = Path.read_bytes, []

    def read(path: Path) -> bytes:
        data = read_bytes(path)
        if not written:
            written.append(path)
            for other in paths:
                with other.open("ab") as file:
                    file.write(b"{}\n")
        return data

    monkeypatch.setattr(Path, "read_bytes", read)
    assert read_together(paths) == {JOURNAL: LINE + b"{}\n", STUDY_FILE: b"{}\n{}\n"}


def test_journals_that_never_stand_still_wait_for_the_next_time(run_dir, copies, monkeypatch):
    monkeypatch.setattr(mirror, "read_together", lambda _: None)
    Mirror(run_dir, copies).sync()
    assert copies.names().keys() == COPIED.keys() - {
        JOURNAL,
        STUDY_FILE,
        "trials/0001/checkpoint.pt",
    }


def test_no_checkpoint_is_ahead_of_the_journals(run_dir, copies, monkeypatch):
    """While the first copy is made, the trial in flight gets to its next rung and beyond."""
    put = Location.put

    def put_and_train(self: Location, name: str, content: Iterator[bytes]) -> None:
        put(self, name, content)
        if name == "about.json":
            with (run_dir / JOURNAL).open("ab") as file:
                file.write(b'{"event": "rung", "trial": 1}\n')
            draft = run_dir / "draft"
            draft.write_bytes(b"state after the rung")
            draft.replace(run_dir / "trials/0001/checkpoint.pt")

    monkeypatch.setattr(Location, "put", put_and_train)
    Mirror(run_dir, copies).sync()
    assert without_manifest(contents(Path(copies.root))) == COPIED


@pytest.mark.parametrize("cut_off", [JOURNAL, STUDY_FILE, MANIFEST])
def test_a_copy_that_is_cut_off_is_the_one_before(cut_off, run_dir, copies, tmp_path, monkeypatch):
    kept = Mirror(run_dir, copies)
    kept.sync()
    for name in (JOURNAL, STUDY_FILE):
        with (run_dir / name).open("ab") as file:
            file.write(b'{"later": 1}\n')
    put = Location.put

    def die(self: Location, name: str, content: Iterator[bytes]) -> None:
        if name == cut_off:
            raise OSError("killed")
        put(self, name, content)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="killed"):
        patch.setattr(Location, "put", die)
        kept.sync()
    fetch(copies, tmp_path / "fetched")
    assert without_manifest(contents(tmp_path / "fetched")) == COPIED
    kept.sync()
    fetch(copies, tmp_path / "later")
    assert (tmp_path / "later" / STUDY_FILE).read_bytes() == b'{}\n{"later": 1}\n'


@pytest.mark.parametrize("cut_off", [JOURNAL, STUDY_FILE])
def test_a_first_copy_that_is_cut_off_has_no_trial(cut_off, run_dir, copies, tmp_path, monkeypatch):
    put = Location.put

    def die(self: Location, name: str, content: Iterator[bytes]) -> None:
        if name == cut_off:
            raise OSError("killed")
        put(self, name, content)

    monkeypatch.setattr(Location, "put", die)
    with pytest.raises(OSError, match="killed"):
        Mirror(run_dir, copies).sync()
    (tmp_path / "there").mkdir()
    fetch(copies, tmp_path / "there" / ".." / "fetched")
    found = contents(tmp_path / "fetched")
    assert found["config.yaml"] == COPIED["config.yaml"]
    assert found.get(JOURNAL, b"") == found.get(STUDY_FILE, b"") == b""


# --- Taken up elsewhere ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_a_fetched_copy_is_the_run_folder_and_knows_where_it_came_from(
    kind, run_dir, copies, s3, bucket, tmp_path
):
    place = copies if kind == "folder" else bucket
    Mirror(run_dir, place).sync()
    address = copies.address if kind == "folder" else f"{s3.address}/pre/run{s3.query}"
    fetch(find_copy(address), tmp_path / "elsewhere")
    assert without_manifest(contents(tmp_path / "elsewhere")) == COPIED
    assert address_of(tmp_path / "elsewhere") == place.address
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".fetched")]


def test_a_fetched_copy_is_not_sent_back(run_dir, s3, bucket, tmp_path):
    Mirror(run_dir, bucket).sync()
    fetch(bucket, tmp_path / "elsewhere")
    s3.puts.clear()
    Mirror(tmp_path / "elsewhere", bucket).sync()
    sent = {name.removeprefix("pre/run/") for name in s3.puts if name[-1] != "/"}
    assert sent <= {JOURNAL, STUDY_FILE, MANIFEST}


def test_an_address_above_a_run_folder_is_told_what_is_in_it(run_dir, copies, tmp_path):
    Mirror(run_dir, copies).sync()
    with pytest.raises(UserError, match=r"copies: no run folder .*; it has the run folders run$"):
        find_copy(f"file://{tmp_path}/copies")
    with pytest.raises(UserError, match="nowhere: no run folder"):
        find_copy(f"file://{tmp_path}/nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_an_object_cannot_leave_the_run_folder(run_dir, s3, bucket, tmp_path):
    Mirror(run_dir, bucket).sync()
    s3.complete("pre/run/../../evil", b"evil")
    with pytest.raises(UserError, match="evil is no file of a run folder"):
        fetch(bucket, tmp_path / "a" / "b" / "elsewhere")
    assert not list(tmp_path.rglob("evil"))


# --- A store that fails ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("s3://KEY:se/cr+et@bucket/pre/fix?region=x", "s3://bucket/pre/fix"),
        ("s3://KEY:secret@bucket?endpoint_override=h:1", "s3://bucket"),
        ("gs://anonymous@bucket/x/", "gs://bucket/x"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("file:///a/b", "file:///a/b"),
    ],
)
def test_what_is_shown_of_an_address_holds_no_secret(address, shown):
    assert public(address) == shown


def test_a_place_in_use_is_not_a_new_one(run_dir, copies, tmp_path):
    Mirror(run_dir, copies).sync()
    with pytest.raises(UserError, match="a search is there already; go on with it by --resume"):
        reserve("--storage", f"file://{tmp_path}/copies", "run", new=True)


def test_a_place_that_can_be_used_is_left_as_it_was(tmp_path):
    location = reserve("--storage", f"file://{tmp_path}/copies", "run", new=True)
    assert location.names() == {}


@pytest.fixture
def quick(monkeypatch) -> None:
    monkeypatch.setattr(mirror, "SYNC_SECONDS", 0.02)
    monkeypatch.setattr(mirror, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(mirror, "RETRY_SECONDS", 0.0)


def wait_until(predicate: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not predicate():
        assert time.monotonic() < deadline
        os.sched_yield()


@pytest.mark.usefixtures("quick")
def test_a_copy_is_kept_up_while_a_search_runs_and_brought_up_to_date_at_its_end(run_dir, copies):
    said = StringIO()
    with mirroring(run_dir, copies, Console(file=said, width=200)):
        wait_until(lambda: MANIFEST in copies.names())
        (run_dir / "facts.json").write_bytes(b"{}")
        wait_until(lambda: "facts.json" in copies.names())
        (run_dir / "report.html").write_bytes(b"report")
    assert "report.html" in copies.names()
    assert said.getvalue() == f"Mirror: {copies.address}\n"


@pytest.mark.usefixtures("quick")
def test_a_trial_that_ends_is_copied_at_once(run_dir, copies, monkeypatch):
    monkeypatch.setattr(mirror, "SYNC_SECONDS", 10**6)
    with mirroring(run_dir, copies, Console(quiet=True)):
        with (run_dir / JOURNAL).open("ab") as file:
            file.write(b'{"event": "end", "trial": 0}\n')
        wait_until(lambda: MANIFEST in copies.names())


def test_the_last_copy_is_made_when_it_is_asked_for_and_said_once(run_dir, copies):
    said = StringIO()
    with mirroring(run_dir, copies, Console(file=said, width=200)) as finish:
        finish()
        assert MANIFEST in copies.names()
    assert said.getvalue() == f"Mirror: {copies.address}\n"


def test_an_interrupted_search_is_copied_too(run_dir, copies):
    with pytest.raises(KeyboardInterrupt), mirroring(run_dir, copies, Console(quiet=True)):
        (run_dir / "trials/0001/checkpoint.pt").write_bytes(b"as it was stopped")
        raise KeyboardInterrupt
    saved = Path(copies.root) / "trials/0001/checkpoint.pt"
    assert saved.read_bytes() == b"as it was stopped"


def test_a_search_that_has_not_begun_leaves_nothing_in_the_store(run_dir, copies):
    (run_dir / "config.yaml").unlink()
    with mirroring(run_dir, copies, Console(quiet=True)):
        pass
    assert copies.names() == {}


@pytest.mark.usefixtures("quick")
def test_a_store_that_fails_for_a_while_is_warned_of_once_and_made_up_for(run_dir, s3, bucket):
    said = StringIO()
    with mirroring(run_dir, bucket, Console(file=said, width=300)):
        wait_until(lambda: "pre/run/mirror.json" in s3.objects)
        s3.broken = True
        (run_dir / "about.json").write_bytes(b"later")
        wait_until(lambda: "warning" in said.getvalue())
        refused = s3.refused
        wait_until(lambda: s3.refused > refused + 3)
        s3.broken = False
    assert s3.objects["pre/run/about.json"] == b"later"
    warning, last = said.getvalue().splitlines()
    assert warning.startswith("warning: not copied to s3://bucket/pre/run, tried again: ")
    assert "Access Denied" in warning
    assert last == "Mirror: s3://bucket/pre/run"


@pytest.mark.usefixtures("quick")
def test_a_store_that_does_not_come_back_is_told_of_at_the_end(run_dir, s3, bucket):
    said = StringIO()
    with mirroring(run_dir, bucket, Console(file=said, width=300)):
        s3.broken = True
    last = said.getvalue().splitlines()[-1]
    assert "The mirror s3://bucket/pre/run is NOT complete" in last
    assert f"--resume {run_dir}" in last
    assert "secret" not in said.getvalue()
