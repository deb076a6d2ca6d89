"""However a search ends before its time, it says in one message how it is gone on with, and that
command works."""

from __future__ import annotations

import errno
import json
import os
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.error import TuneError
from rich.console import Console

from raysae.config import find_space, load_config
from raysae.errors import InterruptedSearchError, UserError, no_room
from raysae.pool.jobs import HaltedError
from raysae.search import run as module
from raysae.search.cluster import Plan, RayStartError
from raysae.search.lock import lock
from raysae.search.run import choose_run_dir, load_run, make_run_dir, resolve, run_search
from raysae.store import files

PLAN = Plan(
    workers=1, max_workers=1, workers_per_trial=1, trials_per_pack=1, concurrent_trials=1,
    cpus=1, gpus=0, local=True,
)  # fmt: skip


def full(number: int = errno.ENOSPC) -> OSError:
    return OSError(number, os.strerror(number), "/runs/optuna.journal")


def from_cause(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


def raising(error: BaseException) -> Any:
    def call(*_: Any, **__: Any) -> None:
        raise error

    return call


@pytest.fixture
def search(tmp_path: Path):
    """Start a search in a new folder, or take it up there."""
    config = resolve(load_config(find_space("orth.yaml")))

    def go(*, resume: bool = False) -> Any:
        folder = tmp_path / "run"
        if resume:
            found = load_run(folder)
            assert found == config
        else:
            folder = make_run_dir(choose_run_dir(str(folder), "run"))
        return run_search(config, folder, Console(quiet=True), resume=resume)

    return go


def end_of(search: Any, **how: Any) -> InterruptedSearchError:
    with pytest.raises(InterruptedSearchError) as caught:
        search(**how)
    return caught.value


# --- While Ray starts -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (RayStartError("no dashboard"), 1)]
)
def test_a_search_that_ends_while_ray_starts_is_gone_on_with_by_the_command_it_prints(
    error: BaseException, code: int, search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module.cluster, "start", raising(error))
    for resume in (False, True, True):
        end = end_of(search, resume=resume)
        assert end.code == code
        assert f"go on with: python run_search.py --resume {tmp_path / 'run'}" in str(end)

    # As far as Ray it comes: what is seen there is the search's own plan.
    monkeypatch.setattr(module.cluster, "start", lambda *_: (PLAN, None))
    monkeypatch.setattr(module, "_start_broker", raising(KeyboardInterrupt()))
    end_of(search, resume=True)
    about = json.loads((tmp_path / "run" / "about.json").read_text())
    assert about["plan"] == vars(PLAN)
    assert len(about["sessions"]) == 4


def test_a_search_that_was_refused_leaves_its_folder_to_another(
    search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module.cluster, "start", raising(UserError("resources.workers: too many")))
    for _ in range(2):
        with pytest.raises(UserError, match="too many"):
            search()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


def test_a_search_that_was_begun_is_not_forgotten_when_it_is_refused_to_go_on(
    search, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module.cluster, "start", raising(KeyboardInterrupt()))
    end_of(search)
    monkeypatch.setattr(module.cluster, "start", raising(UserError("resources.workers: too many")))
    for _ in range(2):
        with pytest.raises(UserError, match="too many"):
            search(resume=True)


def test_a_search_that_ends_before_anything_is_written_says_that_nothing_has_begun(
    search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "write_about", raising(KeyboardInterrupt()))
    for _ in range(2):
        end = str(end_of(search))
        assert "nothing has begun" in end and "--resume" not in end
        assert f"--out {tmp_path / 'run'}" in end


def test_a_folder_in_which_nothing_began_knows_of_no_mirror(tmp_path: Path):
    for name in ("lock", "mirror.json"):
        (tmp_path / name).touch()
    made = make_run_dir(choose_run_dir(str(tmp_path), ""))
    assert [path.name for path in made.iterdir()] == ["lock"]


def test_a_folder_with_anything_of_another_search_is_not_taken(tmp_path: Path):
    for name in ("lock", "journal.jsonl"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="exists already"):
        choose_run_dir(str(tmp_path), "")


def test_a_folder_in_which_another_search_has_just_begun_is_not_taken(search, tmp_path: Path):
    folder = make_run_dir(tmp_path / "run")
    with lock(folder), pytest.raises(UserError, match="another search is at work"):
        search()


# --- A full disk ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_from_the_beginning(
    number: int, search, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(files, "sync", raising(full(number)))
    end = end_of(search)
    assert end.code == 1
    assert os.strerror(number) in str(end) and "nothing has begun" in str(end)


FULL = {
    "in this process": full(),
    "of a quota": full(errno.EDQUOT),
    "as a cause": from_cause(TuneError("The Ray Tune run failed."), full()),
    "as text": TuneError(f"Traceback …\nOSError: [Errno 28] {os.strerror(errno.ENOSPC)}: '/runs'"),
    "as the cause of text": from_cause(
        TuneError("failed"), RuntimeError(f"x\n{os.strerror(errno.ENOSPC)}")
    ),
}


@pytest.mark.parametrize("error", FULL.values(), ids=FULL)
def test_a_disk_that_is_full_while_trials_run(
    error: Exception, search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module.cluster, "start", lambda *_: (PLAN, None))
    monkeypatch.setattr(module, "_start_broker", raising(error))
    end = end_of(search)
    words = os.strerror(getattr(error, "errno", errno.ENOSPC))
    assert end.code == 1 and words in str(end) and "make room" in str(end)
    assert f"go on with: python run_search.py --resume {tmp_path / 'run'}" in str(end)
    assert "\n" not in str(end)


def test_a_journal_that_cannot_be_written(search, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module.cluster, "start", lambda *_: (PLAN, None))
    monkeypatch.setattr(module, "_start_broker", raising(HaltedError("journal: Input/output")))
    end = end_of(search)
    assert "the search stopped: journal: Input/output; go on with" in str(end)


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("a mistake"), OSError(errno.EIO, "Input/output error")]
)
def test_any_other_error_is_not_hidden(error: Exception, search, monkeypatch: pytest.MonkeyPatch):
    assert no_room(error) == ""
    monkeypatch.setattr(module.cluster, "start", lambda *_: (PLAN, None))
    monkeypatch.setattr(module, "_start_broker", raising(error))
    with pytest.raises(type(error)) as caught:
        search()
    assert caught.value is error


# --- While the results are written ----------------------------------------------------------------


@pytest.fixture
def trials_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search without Ray, whose trials take no time."""

    @contextmanager
    def nothing(*_: Any, **__: Any):
        yield None

    monkeypatch.setattr(module.cluster, "start", lambda *_: (PLAN, None))
    monkeypatch.setattr(module.cluster, "metrics_addresses", lambda: [])
    monkeypatch.setattr(module, "_start_broker", lambda *_: SimpleNamespace())
    monkeypatch.setattr(module, "run_pool", lambda *_: None)
    store = SimpleNamespace(fill=lambda: None, refused="", held=None)
    monkeypatch.setattr(module, "Store", lambda *_: store)
    monkeypatch.setattr("raysae.search.watch.Watch", nothing)
    monkeypatch.setattr(module, "_guarded", nothing)
    monkeypatch.setattr(module, "_run_trials", lambda *_: None)
    monkeypatch.setattr(module, "_close", lambda *_: None)


@pytest.mark.usefixtures("trials_have_ended")
@pytest.mark.parametrize(
    ("error", "code", "words"),
    [(KeyboardInterrupt(), 130, "interrupted"), (full(), 1, os.strerror(errno.ENOSPC))],
)
def test_a_search_that_ends_while_it_writes_its_results(
    error: BaseException,
    code: int,
    words: str,
    search,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(module, "conclude", raising(error))
    end = end_of(search)
    assert end.code == code and words in str(end)
    assert f"go on with: python run_search.py --resume {tmp_path / 'run'}" in str(end)
    monkeypatch.setattr(module, "conclude", lambda *_: "the results")
    assert search(resume=True) == "the results"
