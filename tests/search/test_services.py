"""The pool's run goes on where Ray gives up on it."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from rich.console import Console

from raysae.config import load_config
from raysae.errors import UserError
from raysae.search import services
from raysae.search.cluster import make_plan
from raysae.search.run import resolve

ORTH = Path(__file__).parent.parent.parent / "search_spaces" / "orth.yaml"


@pytest.fixture
def run_pool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`services.run_pool` with a trainer whose `fit` raises these errors, one after the other.

    Returns how often it was called, and what the broker was told.
    """
    told: list[str] = []
    fits: list[Exception | None] = []
    broker = SimpleNamespace(halt=SimpleNamespace(remote=told.append))
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get", lambda value: value)

    def run(*errors: Exception | None) -> tuple[int, list[str]]:
        class Trainer:
            def __init__(self, *_: Any, **__: Any) -> None: ...

            def fit(self) -> None:
                error = errors[min(len(fits), len(errors) - 1)]
                fits.append(error)
                if error is not None:
                    raise error

        monkeypatch.setattr(services, "_trainer_class", lambda *_, **__: Trainer)
        config = resolve(load_config(ORTH))
        plan = make_plan(config, [{"CPU": 3}], local=True)
        services.run_pool(config, plan, "namespace", tmp_path, broker)
        return len(fits), told

    return run


def test_another_pool_is_started_where_the_controller_died(run_pool: Any):
    died = ray.exceptions.ActorDiedError()
    assert run_pool(died, died, None) == (3, ["the worker pool ended before the search did"])


def test_a_controller_that_dies_every_time_ends_the_search(run_pool: Any, tmp_path: Path):
    fits, (told,) = run_pool(ray.exceptions.ActorDiedError())
    assert fits == services.CONTROLLER_ATTEMPTS
    assert told.startswith("the worker pool failed: ")
    assert f"(log: {tmp_path / 'pool_error.log'})" in told


def test_a_pool_that_fails_on_a_full_disk_is_still_heard_of(
    run_pool: Any, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    _, (told,) = run_pool(RuntimeError("more failures than allowed"))
    assert "more failures than allowed" in told and "No space left on device" in told


def test_a_pool_that_failed_in_another_way_is_not_started_again(run_pool: Any):
    fits, (told,) = run_pool(RuntimeError("more failures\nthan allowed"))
    assert fits == 1
    assert "the worker pool failed: than allowed" in told


@pytest.mark.parametrize(
    ("setting", "share", "workers"),
    [
        ({}, 1, 2),
        ({"resources.trials_per_pack": 4}, 1, 2),
        ({"resources.workers_per_gpu": 4}, 0.25, 8),
    ],
)
def test_a_worker_has_a_gpu_or_the_share_of_one_that_is_set(
    setting: dict[str, int],
    share: float,
    workers: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    asked: dict[str, Any] = {}

    class Trainer:
        def __init__(self, *_: Any, **arguments: Any) -> None:
            asked.update(arguments)

        def fit(self) -> None: ...

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(services, "_trainer_class", lambda *_, **__: Trainer)
    config = resolve(load_config(ORTH, {"resources.use_gpu": True} | setting))
    plan = make_plan(config, [{"CPU": 9, "GPU": 2}], local=True)
    services.run_pool(config, plan, "namespace", tmp_path, None)
    assert asked["scaling_config"].resources_per_worker["GPU"] == share
    assert asked["scaling_config"].num_workers == plan.workers == workers
    assert asked["train_loop_config"]["workers_per_gpu"] == setting.get(
        "resources.workers_per_gpu", 1
    )


def test_what_a_task_says_of_the_users_input_ends_the_search_with_that_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    said = UserError("world.llm_batch_size: set it lower than 4")
    failed = ray.exceptions.RayTaskError("evaluation_cache", "Traceback …", said)
    told: list[str] = []

    def harvest(*_: Any, **__: Any) -> Any:
        raise failed.as_instanceof_cause()

    monkeypatch.setattr("raysae.store.harvest.harvest", harvest)
    monkeypatch.setattr(ray, "nodes", lambda: [])
    monkeypatch.setattr(ray, "get", lambda value: value)
    config = resolve(load_config(ORTH))
    broker = SimpleNamespace(halt=SimpleNamespace(remote=told.append))
    plan = make_plan(config, [{"CPU": 3}], local=True)
    store = services.Store(config, plan, broker, Console(), tmp_path)
    store.fill()
    assert [store.refused] == told == ["world.llm_batch_size: set it lower than 4"]
