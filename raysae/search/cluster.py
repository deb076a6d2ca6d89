"""Ray for one search: started here, or joined at an address; and whether the plan fits on it."""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysae.config import RunConfig
from raysae.errors import UserError

HARVEST_CPUS = 1
STORE_BYTES = 1 << 30

_ENVIRONMENT = {
    # `uv run` would make Ray copy the project and start every worker through uv.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    # On a busy machine the dashboard takes longer than Ray's minute, and Ray would give up.
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "300",
    # Progress bars and banners of Tune: the search has its own display.
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Workers must not look for a model hub that the search does not need.
    "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
    "TOKENIZERS_PARALLELISM": "false",
}

WORKER_ENVIRONMENT = {
    # Activations of a batch are megabytes, and by default glibc gives every one of them back to the
    # kernel when it is freed: a third of a training step on CPU would go into page faults.
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),  # the most that every glibc accepts
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
}
"""For the processes that compute; read by glibc when a process starts."""


@dataclass(frozen=True)
class Plan:
    """How a search uses the cluster."""

    workers: int
    workers_per_trial: int
    concurrent_trials: int
    cpus: int
    gpus: int
    local: bool

    @property
    def pool_size(self) -> int | tuple[int, int]:
        """Workers as Ray Train takes them: on a cluster, whose nodes come and go, from one up."""
        elastic = not self.local and self.workers_per_trial == 1
        return (1, self.workers) if elastic else self.workers

    @property
    def groups(self) -> int:
        """Trials that train at the same time."""
        return self.workers // self.workers_per_trial


def check_address(address: str) -> None:
    """Find out in seconds, and without Ray, that nothing answers at `address`; Ray takes minutes.

    Raises:
        UserError: not "auto" or host:port, or no connection.
    """
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in address:
        raise UserError(f"--address {address}: must be HOST:PORT of a Ray head node, or auto")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--address {address}: nothing answers there ({error}); start a cluster with "
            "`ray start --head`, or leave --address out to use this machine"
        ) from None


def start(config: RunConfig, address: str | None, namespace: str) -> tuple[Plan, str | None]:
    """Start or join Ray, and plan the search on it.

    Returns:
        the plan, and the dashboard's address if it has one.

    Raises:
        UserError: the address cannot be reached, or the cluster is too small for the plan.
    """
    # A Ray that is started here hands its environment on to the workers.
    for name, value in (_ENVIRONMENT | WORKER_ENVIRONMENT).items():
        os.environ.setdefault(name, value)
    if address is None:
        # Nobody preempts this machine, and the watcher's process delays the first trial.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    import ray

    resources = config.resources
    cores = len(os.sched_getaffinity(0))
    common: dict[str, Any] = {
        "namespace": namespace,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": True,
    }
    if address is None:
        workers = resources.workers or max(1, cores // resources.threads_per_worker)
        # One logical CPU more than the workers take, so that the harvest can run beside them
        # while they start; it is idle afterwards. Logical CPUs are promises, not cores.
        context = ray.init(
            address="local",  # a cluster that happens to run here is not to be joined unasked
            num_cpus=workers * resources.threads_per_worker + HARVEST_CPUS,
            num_gpus=workers if resources.use_gpu else 0,
            object_store_memory=STORE_BYTES,
            include_dashboard=True,
            **common,
        )
    else:
        try:
            context = ray.init(
                address=address, runtime_env={"env_vars": WORKER_ENVIRONMENT}, **common
            )
        except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
            raise UserError(
                f"--address {address}: no Ray cluster can be reached there "
                f"({str(error).splitlines()[0]}); start one with `ray start --head`, or leave "
                f"--address out to use this machine{_token_hint()}"
            ) from None
    try:
        plan = make_plan(config, ray.cluster_resources(), local=address is None)
    except UserError:
        ray.shutdown()
        raise
    url = context.dashboard_url
    return plan, f"http://{url}" if url else None


def metrics_addresses() -> list[str]:
    """Where Prometheus finds the metrics of the cluster's nodes; Ray must be up."""
    import ray

    return [
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for node in ray.nodes()
        if node["Alive"]
    ]


def _token_hint() -> str:
    """`ray start` asks for the token that it finds; who joins has to say that it has one."""
    variables = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    here = (
        any(os.environ.get(name) for name in variables)
        or (Path.home() / ".ray" / "auth_token").is_file()
    )
    if not here or os.environ.get("RAY_AUTH_MODE") == "token":
        return ""
    return "; if the cluster asks for a token, set RAY_AUTH_MODE=token"


def make_plan(config: RunConfig, cluster: dict[str, float], *, local: bool) -> Plan:
    """Fit the pool to the cluster, or say why it cannot be.

    A pool that waits for CPUs which its own trials hold would hang without a word, so a plan that
    does not fit is refused here.

    Args:
        config: of the search.
        cluster: `ray.cluster_resources()`.
        local: whether Ray was started for this search alone.

    Raises:
        UserError: more workers than the cluster has room for.
    """
    resources = config.resources
    cpus, gpus = int(cluster.get("CPU", 0)), int(cluster.get("GPU", 0))
    per_worker, per_trial = resources.threads_per_worker, resources.workers_per_trial
    room = (cpus - HARVEST_CPUS) // per_worker
    limit = "CPUs"
    if resources.use_gpu and gpus < room:
        room, limit = gpus, "GPUs"
    workers = resources.workers or max(1, room // per_trial) * per_trial
    if workers > room:
        raise UserError(
            f"resources.workers: {workers} workers with {per_worker} CPU(s)"
            f"{' and 1 GPU' if resources.use_gpu else ''} each, and {HARVEST_CPUS} CPU for the "
            f"harvest, do not fit: the cluster has {cpus} CPUs and {gpus} GPUs, room for {room} "
            f"workers (short of {limit}); set resources.workers to at most {room}"
        )
    if workers % per_trial:
        raise UserError(
            f"resources.workers_per_trial: {workers} workers cannot be divided into groups of "
            f"{per_trial}; set resources.workers to a multiple of {per_trial}"
        )
    groups = workers // per_trial
    concurrent = min(config.search.max_concurrent or groups, groups, config.num_trials)
    return Plan(workers, per_trial, concurrent, cpus, gpus, local)
