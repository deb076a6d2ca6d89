"""Ray for one search: started here, or joined at an address; and whether the plan fits on it."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from raysae.config import RunConfig
from raysae.errors import UserError, first_line
from raysae.resources import ResourcesConfig
from raysae.search.room import model_memory, room_on_gpu, trials_per_pack
from raysae.search.sizes import choose_store_memory, needed_store_memory
from raysae.worlds.world import World

HARVEST_CPUS = 1
FREE_SECONDS = 5

_ENVIRONMENT = {
    # `uv run` would make Ray copy the project and start every worker through uv.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    # On a busy machine the dashboard takes longer than Ray's minute, and Ray would give up.
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "300",
    # A pool that is started on a node just lost would wait for it for a minute. Ray Train counts a
    # cluster's nodes every 20 s: after that long it knows better, and asks for what there is.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
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
class Gpu:
    """One of this machine."""

    name: str
    free_bytes: int


@dataclass(frozen=True)
class NodeRoom:
    """What a node has."""

    name: str
    cpus: int
    gpus: int
    store_bytes: int
    """Of its object store."""
    memory_bytes: int | None
    """For processes; None: not known."""

    def most_workers(self, plan: Plan, resources: ResourcesConfig) -> int:
        """Workers of the plan that Ray may put on it."""
        room = min(plan.workers, self.cpus // resources.threads_per_worker)
        return min(room, self.gpus * resources.workers_per_gpu) if resources.on_gpu else room


@dataclass(frozen=True)
class Plan:
    """How a search uses the cluster."""

    workers: int
    """That there is room for now."""
    max_workers: int
    """As far as the pool grows."""
    workers_per_trial: int
    trials_per_pack: int
    concurrent_trials: int
    cpus: int
    gpus: int
    local: bool
    workers_per_gpu: int = 1
    """That share one, where GPUs are used."""

    @property
    def pool_size(self) -> int | tuple[int, int]:
        """Workers as Ray Train takes them: on a cluster, whose nodes come and go, from what one
        trial takes up.
        """
        return self.workers if self.local else (self.workers_per_trial, self.max_workers)

    @property
    def groups(self) -> int:
        """Groups of workers, each of which trains one trial at a time, or a pack of them."""
        return self.workers // self.workers_per_trial

    @property
    def at_a_time(self) -> int:
        """Groups that are at work where nobody waits for results: all, unless
        `search.max_concurrent` allows fewer trials than that."""
        return max(1, min(self.groups, self.concurrent_trials))


class RayStartError(Exception):
    """Ray does not start on this machine; the message says what it said."""


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


def start(
    config: RunConfig, address: str | None, namespace: str, world: World | None = None
) -> tuple[Plan, str | None]:
    """Start or join Ray, and plan the search on it; its world decides what fits a GPU.

    Returns:
        the plan, and the dashboard's address if it has one.

    Raises:
        UserError: the address cannot be reached, or the cluster is too small for the plan.
        RayStartError: Ray does not start on this machine.
    """
    # A Ray that is started here hands its environment on to the workers.
    for name, value in (_ENVIRONMENT | WORKER_ENVIRONMENT).items():
        os.environ.setdefault(name, value)
    if address is None:
        # Nobody preempts this machine, and the watcher's process delays the first trial.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    import ray

    common: dict[str, Any] = {
        "namespace": namespace,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": True,
    }
    if address is None:
        memory = choose_store_memory(config, world)
        context = _start_here(local_resources(config), memory, **common)
    else:
        context = _join(address, runtime_env={"env_vars": WORKER_ENVIRONMENT}, **common)
    try:
        gpu_bytes = free_for_saes(config, world)
        plan = make_plan(config, _free_resources(), local=address is None, gpu_bytes=gpu_bytes)
    except UserError:
        ray.shutdown()
        raise
    url = context.dashboard_url
    return plan, f"http://{url}" if url else None


def _start_here(resources: dict[str, int], store_memory: int, **arguments: Any) -> Any:
    import ray

    try:
        with _loopback():
            return ray.init(
                address="local",  # a cluster that happens to run here is not to be joined unasked
                num_cpus=resources["CPU"],
                num_gpus=resources["GPU"],
                object_store_memory=store_memory,
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                **arguments,
            )
    except Exception as error:  # a dashboard that is late is no narrower one
        raise RayStartError(
            f"Ray did not start on this machine ({type(error).__name__}: {first_line(error)}); "
            "where the machine was overloaded, another try helps; Ray's logs are in the newest "
            "folder of its temporary directory, /tmp/ray unless RAY_TMPDIR says otherwise"
        ) from error


@contextmanager
def _loopback() -> Iterator[None]:
    """Have Ray give the node that it starts the address 127.0.0.1: all its processes then listen
    there alone.

    On Linux it would take the address that the machine has for others, also where it is told
    `_node_ip_address="127.0.0.1"`. On macOS and Windows this is what it does by itself.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _join(address: str, **arguments: Any) -> Any:
    import ray

    try:
        return ray.init(address=address, **arguments)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        raise UserError(
            f"--address {address}: no Ray cluster can be reached there "
            f"({str(error).splitlines()[0]}); start one with `ray start --head`, or leave "
            f"--address out to use this machine{_token_hint()}"
        ) from None


def local_resources(config: RunConfig) -> dict[str, int]:
    """CPUs and GPUs that Ray is told of where it is started here.

    Raises:
        UserError: the search wants more GPUs than this machine has.
    """
    resources = config.resources
    gpus = len(list_gpus()) if resources.on_gpu else 0
    room = gpus * resources.workers_per_gpu
    if resources.on_gpu and room < (resources.workers or 1):
        raise UserError(
            f"resources.use_gpu: {resources.workers or 1} workers with {_share(resources)} each, "
            f"and this machine has {gpus or 'none'}; set resources.workers to what it has, "
            "resources.use_gpu to false, or join a cluster with --address"
        )
    cores = len(os.sched_getaffinity(0))
    by_cores = max(1, cores // resources.threads_per_worker)
    workers = resources.workers or (min(room, by_cores) if gpus else by_cores)
    # One logical CPU more than the workers take, so that the harvest can run beside them
    # while they start; it is idle afterwards. Logical CPUs are promises, not cores.
    return {"CPU": workers * resources.threads_per_worker + HARVEST_CPUS, "GPU": gpus}


def _share(resources: ResourcesConfig) -> str:
    """Of a GPU, for one worker, in words."""
    return "a GPU" if resources.workers_per_gpu == 1 else f"1/{resources.workers_per_gpu} GPU"


def list_gpus() -> list[Gpu]:
    """The GPUs that the driver lists and this process may use, without importing torch."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.free", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    found = []
    for line in done.stdout.splitlines():
        name, _, free = line.rpartition(",")
        found.append(Gpu(name.strip(), int(free) << 20 if free.strip().isdigit() else 0))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    return found[: len([part for part in visible.split(",") if part.strip() not in ("", "-1")])]


def free_for_saes(config: RunConfig, world: World | None) -> int | None:
    """Bytes for SAEs on the smallest of this machine's GPUs; those of a cluster are taken to be
    like them. None where a search uses none, or this machine has none.
    """
    gpus = list_gpus() if config.resources.on_gpu else []
    if not gpus:
        return None
    free = min(gpu.free_bytes for gpu in gpus)
    return room_on_gpu(free, model_memory(config, world) or 0, config.resources.workers_per_gpu)


def look(
    config: RunConfig, address: str | None, world: World | None = None
) -> tuple[Plan, list[NodeRoom]]:
    """The plan of a search and the nodes it would run on; nothing is started for it.

    Raises:
        UserError: as `start`.
    """
    if address is None:
        here = local_resources(config)
        node = NodeRoom(
            "this machine",
            here["CPU"],
            here["GPU"],
            choose_store_memory(config, world),
            psutil.virtual_memory().available,
        )
        free = {name: float(n) for name, n in here.items()}
        return make_plan(config, [free], local=True, gpu_bytes=free_for_saes(config, world)), [node]
    import ray

    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    _join(address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        nodes = [
            NodeRoom(
                node["NodeManagerHostname"],
                int(node["Resources"].get("CPU", 0)),
                int(node["Resources"].get("GPU", 0)),
                int(node["Resources"].get("object_store_memory", 0)),
                int(node["Resources"].get("memory", 0)),
            )
            for node in ray.nodes()
            if node["Alive"]
        ]
        gpu_bytes = free_for_saes(config, world)
        return make_plan(config, _free_resources(), local=False, gpu_bytes=gpu_bytes), nodes
    finally:
        ray.shutdown()


def imagine(config: RunConfig, world: World | None) -> tuple[Plan, list[NodeRoom]]:
    """The plan of a search on a machine with as many GPUs as it asks for, and that machine, whose
    memory is large enough.
    """
    workers = config.resources.workers or config.resources.workers_per_trial
    cpus = workers * config.resources.threads_per_worker + HARVEST_CPUS
    memory = needed_store_memory(config, world)
    gpus = config.resources.gpus_of(workers)
    node = NodeRoom("a machine with GPUs", cpus, gpus, memory, None)
    return make_plan(config, [{"CPU": float(cpus), "GPU": float(gpus)}], local=True), [node]


def _free_resources() -> list[dict[str, float]]:
    """CPUs and GPUs of each node that nobody holds: what others hold, a pool would wait for
    without end.

    What a search that has just ended held comes free within seconds, and is waited for.
    """
    deadline = time.monotonic() + FREE_SECONDS
    while True:
        nodes = look_at_nodes()
        if time.monotonic() > deadline or all(
            free[name] >= total.get(name, 0.0) for free, total in nodes for name in free
        ):
            return [free for free, _ in nodes]
        time.sleep(0.2)


def look_at_nodes() -> list[tuple[dict[str, float], dict[str, float]]]:
    """What is free of each node's CPUs and GPUs, and all that it has; Ray must be up."""
    import ray

    # Its public counterparts know of the cluster's sums alone.
    from ray._private.state import available_resources_per_node

    available = available_resources_per_node()
    return [
        (
            {name: available.get(node["NodeID"], {}).get(name, 0.0) for name in ("CPU", "GPU")},
            node["Resources"],
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def workers_that_fit(resources: ResourcesConfig, nodes: Sequence[Mapping[str, float]]) -> int:
    """Workers that these nodes have room for beside the harvest: each is on one of them."""
    threads, cpus, workers = resources.threads_per_worker, 0, 0
    for node in nodes:
        here = int(node.get("CPU", 0))
        fit = here // threads
        if resources.on_gpu:
            fit = min(fit, int(node.get("GPU", 0)) * resources.workers_per_gpu)
        cpus, workers = cpus + here, workers + fit
    return max(0, min(workers, (cpus - HARVEST_CPUS) // threads))


def needed(resources: ResourcesConfig, workers: int) -> str:
    """What so many workers take, in words."""
    gpu = f" and {_share(resources)}" if resources.on_gpu else ""
    plural = "" if workers == 1 else "s"
    return f"{workers} worker{plural} with {resources.threads_per_worker} CPU(s){gpu} each"


def free_in_words(nodes: Sequence[Mapping[str, float]]) -> str:
    """What is free, in all and on one node."""
    cpus, gpus = ([int(node.get(name, 0)) for node in nodes] for name in ("CPU", "GPU"))
    most = f" on {len(nodes)} nodes, on one at most {max(cpus)} and {max(gpus)}"
    return f"{sum(cpus)} CPUs and {sum(gpus)} GPUs are free{most if len(nodes) > 1 else ''}"


def has_in_words() -> str:
    """What the cluster has now, and what of it is free; Ray must be up."""
    nodes = look_at_nodes()
    cpus, gpus = (int(sum(has.get(name, 0) for _, has in nodes)) for name in ("CPU", "GPU"))
    free = free_in_words([free for free, _ in nodes])
    return f"the cluster has {cpus} CPUs and {gpus} GPUs, of which {free}"


def _advice(resources: ResourcesConfig, nodes: Sequence[Mapping[str, float]], room: int) -> str:
    """What a plan is short of, and the setting that would make it fit, at its largest."""
    per_trial, threads = resources.workers_per_trial, resources.threads_per_worker

    def fit(**changes: Any) -> int:
        return workers_that_fit(resources.model_copy(update=changes), nodes)

    short = "GPUs" if resources.on_gpu and fit(use_gpu=False) > room else "CPUs"
    if room >= per_trial:
        setting = f"set resources.workers to at most {room // per_trial * per_trial}"
    elif room:
        setting = f"set resources.workers_per_trial to at most {room}"
    elif most := [t for t in range(1, threads) if fit(threads_per_worker=t)]:
        setting = f"a worker is on one node: set resources.threads_per_worker to at most {most[-1]}"
    elif resources.on_gpu and fit(use_gpu=False):
        setting = "set resources.use_gpu to false, or choose a cluster with free GPUs"
    else:
        setting = "choose a cluster with more free CPUs"
    return f"(short of {short}); {setting}"


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


def make_plan(
    config: RunConfig,
    nodes: Sequence[Mapping[str, float]],
    *,
    local: bool,
    gpu_bytes: int | None = None,
) -> Plan:
    """Fit the pool to the cluster, or say why it cannot be.

    A pool that waits for CPUs which its own trials hold, or for more of them than any node has,
    would hang without a word, so a plan that does not fit is refused here.

    Args:
        config: of the search.
        nodes: CPUs and GPUs that are free on each, as Ray names them.
        local: whether Ray was started for this search alone.
        gpu_bytes: for SAEs, see `free_for_saes`.

    Raises:
        UserError: more workers than the cluster has room for.
    """
    resources = config.resources
    cpus, gpus = (int(sum(node.get(name, 0) for node in nodes)) for name in ("CPU", "GPU"))
    per_trial, room = resources.workers_per_trial, workers_that_fit(resources, nodes)
    workers = resources.workers or max(1, room // per_trial) * per_trial
    if workers > room:
        raise UserError(
            f"resources.workers: {needed(resources, workers)}, and {HARVEST_CPUS} CPU for the "
            f"harvest, do not fit: {free_in_words(nodes)}, room for {room} workers "
            f"{_advice(resources, nodes, room)}"
        )
    if workers % per_trial:
        raise UserError(
            f"resources.workers_per_trial: {workers} workers cannot be divided into groups of "
            f"{per_trial}; set resources.workers to a multiple of {per_trial}"
        )
    most = workers if local else resources.max_workers or workers
    if most < workers or most % per_trial:
        raise UserError(
            f"resources.max_workers: {most} must be at least the {workers} workers that there is "
            f"room for now, and a multiple of resources.workers_per_trial ({per_trial}); set it "
            "so, or leave it out"
        )
    pack = trials_per_pack(config, gpu_bytes)
    slots = most // per_trial * pack
    concurrent = min(config.search.max_concurrent or slots, slots, config.num_trials)
    shared = resources.workers_per_gpu
    return Plan(workers, most, per_trial, pack, concurrent, cpus, gpus, local, shared)
