"""Experiment trackers: refused before Ray starts if they cannot work, else Ray's own callbacks."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import pytest

from raysae.config import find_space, load_config
from raysae.errors import UserError
from raysae.search import loggers
from raysae.search.loggers import check_loggers, logger_callbacks
from raysae.search.run import resolve


@pytest.fixture
def installed(monkeypatch, tmp_path: Path) -> set[str]:
    """Names of the packages that are there; no key of Weights & Biases is."""
    names: set[str] = set()
    spec = ModuleSpec("package", None)
    monkeypatch.setattr(loggers, "find_spec", lambda name: spec if name in names else None)
    for variable in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_PROJECT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return names


# --- Before Ray starts ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "message"),
    [
        (set(), r"mlflow, aim are not installed; pip install mlflow aim"),
        ({"mlflow"}, r"aim is not installed; pip install aim"),
    ],
)
def test_a_missing_package_is_named_with_the_command(installed, there: set[str], message: str):
    installed |= there
    with pytest.raises(UserError, match=f"loggers: {message}"):
        check_loggers(("mlflow", "aim"))


@pytest.mark.usefixtures("installed")
def test_nothing_is_needed_for_nothing():
    check_loggers(())


def test_wandb_without_a_key_is_refused_with_the_ways_to_have_one(installed):
    installed |= {"wandb"}
    with pytest.raises(UserError, match=r"wandb login.*WANDB_API_KEY.*WANDB_MODE=offline"):
        check_loggers(("wandb",))


@pytest.mark.parametrize("way", ["key", "offline", "netrc", "own server"])
def test_wandb_with_a_key_or_offline_is_fine(way: str, installed, monkeypatch, tmp_path: Path):
    installed |= {"wandb"}
    if way == "key":
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    elif way == "offline":
        monkeypatch.setenv("WANDB_MODE", "offline")
    else:
        host = "api.wandb.ai" if way == "netrc" else "wandb.here"
        (tmp_path / "netrc").write_text(f"machine {host} login user password {'0' * 40}\n")
        if way == "own server":
            monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.here/path")
    check_loggers(("wandb",))


def test_the_space_file_asks_for_them_in_one_line(installed, tmp_path: Path):
    text = find_space("orth.yaml").read_text(encoding="utf-8")
    space = tmp_path / "space.yaml"
    space.write_text(f"{text}\nloggers: [mlflow]\n", encoding="utf-8")
    with pytest.raises(UserError, match="pip install mlflow"):
        resolve(load_config(space))
    installed |= {"mlflow"}
    assert resolve(load_config(space)).loggers == ("mlflow",)
    space.write_text(f"{text}\nloggers: [mlfow]\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"loggers.*'mlflow'.*got 'mlfow'"):
        load_config(space)


# --- The callbacks --------------------------------------------------------------------------------


def test_mlflow_writes_into_the_run_folder_unless_a_server_is_set(monkeypatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "mlflow", ModuleType("mlflow"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_LOGGING_LEVEL", "INFO")
    (own,) = logger_callbacks(("mlflow",), tmp_path)
    assert own.tracking_uri == f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert own.experiment_name == f"raysae/{tmp_path.name}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    (remote,) = logger_callbacks(("mlflow",), tmp_path)
    assert remote.tracking_uri == "http://server:5000"


def test_wandb_groups_the_trials_of_a_search(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    (callback,) = logger_callbacks(("wandb",), tmp_path)
    assert (callback.project, callback.group) == ("mine", tmp_path.name)
    assert callback.kwargs["dir"] == str(tmp_path)
    assert (tmp_path / "wandb").is_dir()  # or wandb would write to a folder of its own choice


def test_aim_is_told_of_every_trial(monkeypatch, tmp_path: Path):
    """With a module in Aim's place: its wheels are large, and not for every Python."""
    runs: list[Any] = []

    class Run:
        def __init__(self, repo: str, experiment: str, **_: Any) -> None:
            self.repo, self.experiment, self.tracked, self.closed = repo, experiment, {}, False
            self.values: dict[str, Any] = {}
            runs.append(self)

        def __setitem__(self, key: str, value: Any) -> None:
            self.values[key] = value

        def track(self, value: float, name: str, **_: Any) -> None:
            self.tracked[name] = value

        def close(self) -> None:
            self.closed = True

    sdk = ModuleType("aim.sdk")
    sdk.Run, sdk.Repo = Run, object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "aim", ModuleType("aim"))
    monkeypatch.setitem(sys.modules, "aim.sdk", sdk)
    monkeypatch.delitem(sys.modules, "ray.tune.logger.aim", raising=False)
    monkeypatch.delenv("AIM_REPO", raising=False)
    (callback,) = logger_callbacks(("aim",), tmp_path)
    monkeypatch.delitem(sys.modules, "ray.tune.logger.aim")
    trial = Mock(config={"spec": {"alpha": 0.5}}, evaluated_params={"alpha": 0.5})
    callback.log_trial_start(trial)
    callback.log_trial_result(1, trial, {"score": 0.25, "training_iteration": 1, "tokens": 64})
    callback.log_trial_end(trial)
    (run,) = runs
    assert (run.repo, run.experiment) == (str(tmp_path), tmp_path.name)
    assert run.tracked["ray/tune/score"] == 0.25
    assert run.closed
