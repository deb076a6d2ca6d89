"""Experiment trackers by one line of the space file, `loggers: [wandb, mlflow, aim]`.

They are Ray Tune's own callbacks: a trial is a run, each rung a step with its scores and figures.
"""

from __future__ import annotations

import netrc
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from raysae.errors import UserError

PROJECT = "raysae"


def check_loggers(names: tuple[str, ...]) -> None:
    """Find out before Ray starts what would fail when the first trial does.

    Raises:
        UserError: a package is missing, or Weights & Biases has no key.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise UserError(
            f"loggers: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed; "
            f"pip install {' '.join(missing)}"
        )
    if "wandb" in names and not _has_wandb_key():
        raise UserError(
            "loggers: wandb finds no key; run `wandb login`, set WANDB_API_KEY, or set "
            "WANDB_MODE=offline to write to the run folder only"
        )


def logger_callbacks(names: tuple[str, ...], run_dir: Path) -> list[Any]:
    """Ray Tune's callbacks of these names, for `ray.tune.RunConfig(callbacks=…)`.

    A tracker without a server of its own, set by its usual variable, writes into the run folder.
    """
    return [_MAKERS[name](run_dir) for name in names]


def _wandb(run_dir: Path) -> Any:
    from ray.air.integrations.wandb import WandbLoggerCallback, _WandbLoggingActor

    class LoggingActor(_WandbLoggingActor):
        def run(self) -> None:
            super().run()
            # `finish` tells wandb's own process to write what is left and does not wait until it
            # has; Ray kills both as soon as this returns. `teardown` waits.
            self._wandb.teardown()

    class Callback(WandbLoggerCallback):
        _logger_actor_cls = LoggingActor

    folder = run_dir / "wandb"
    folder.mkdir(exist_ok=True)
    return Callback(
        project=os.environ.get("WANDB_PROJECT", PROJECT), group=run_dir.name, dir=str(run_dir)
    )


def _mlflow(run_dir: Path) -> Any:
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    # Its lines about tables that it makes would go through the display.
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    own = f"sqlite:///{run_dir / 'mlflow.db'}"
    return MLflowLoggerCallback(
        tracking_uri=os.environ.get("MLFLOW_TRACKING_URI", own),
        experiment_name=os.environ.get("MLFLOW_EXPERIMENT_NAME", f"{PROJECT}/{run_dir.name}"),
    )


def _aim(run_dir: Path) -> Any:
    from ray.tune.logger.aim import AimLoggerCallback

    return AimLoggerCallback(
        repo=os.environ.get("AIM_REPO", str(run_dir)), experiment_name=run_dir.name
    )


_MAKERS: dict[str, Callable[[Path], Any]] = {"wandb": _wandb, "mlflow": _mlflow, "aim": _aim}


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_MODE") in ("offline", "disabled") or os.environ.get("WANDB_API_KEY"):
        return True
    file = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    try:
        return netrc.netrc(str(file)).authenticators(host) is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False
