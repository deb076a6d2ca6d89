"""A plan fits the cluster, or says what to set; it never waits for CPUs that will not come."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from raysae.config import RunConfig, find_space, load_config
from raysae.errors import InterruptedSearchError, UserError
from raysae.resources import MOST_TRIALS
from raysae.search import cluster
from raysae.search import plan as planning
from raysae.search.cluster import HARVEST_CPUS, Gpu, Plan, make_plan, start
from raysae.search.plan import describe_plan
from raysae.search.room import memory_of_sae, most_seeds, room_on_gpu
from raysae.search.run import resolve, run_search
from raysae.search.sizes import CorpusSize
from raysae.store.tiers import human

ORTH = Path(__file__).parent.parent.parent / "search_spaces" / "orth.yaml"


def test_a_search_of_its_own_does_not_join_a_cluster_that_happens_to_run(monkeypatch):
    """Ray would: one of `ray start`, or of RAY_ADDRESS, and then refuse the number of CPUs."""
    asked: dict[str, Any] = {}

    def init(**arguments: Any) -> None:
        asked.update(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("os.environ", dict(os.environ))
    with pytest.raises(KeyboardInterrupt):
        start(config(), None, "namespace")
    assert asked["address"] == "local"


def test_a_ray_that_does_not_start_ends_in_one_message_that_says_how_to_try_again(
    monkeypatch, tmp_path: Path
):
    def init(**_: Any) -> None:
        raise Exception("The dashboard did not come up\n  a long log")

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("os.environ", dict(os.environ))
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with pytest.raises(InterruptedSearchError) as caught:
        run_search(resolve(config()), run_dir, console=Console(quiet=True))
    message = str(caught.value)
    assert "The dashboard did not come up" in message
    assert "a long log" not in message
    assert f"--resume {run_dir}" in message
    assert caught.value.code == 1


def config(**overrides: Any) -> RunConfig:
    return load_config(ORTH, {name.replace("__", "."): value for name, value in overrides.items()})


def plan(cpus: float, gpus: float = 0, **overrides: Any) -> Plan:
    return make_plan(config(**overrides), [{"CPU": cpus, "GPU": gpus}], local=True)


def refusal(cpus: float, gpus: float = 0, **overrides: Any) -> str:
    with pytest.raises(UserError) as caught:
        plan(cpus, gpus, **overrides)
    return str(caught.value)


@pytest.mark.parametrize("cpus", [2, 5, 33])
def test_by_default_every_cpu_but_the_harvests_trains_a_trial(cpus: int):
    made = plan(cpus, search__num_samples=100)
    assert made.workers == made.groups == made.concurrent_trials == cpus - HARVEST_CPUS
    assert (made.workers_per_trial, made.cpus, made.local) == (1, cpus, True)


def test_the_workers_asked_for_are_what_is_used():
    assert plan(9, resources__workers=3).workers == 3


def test_as_many_workers_as_fit_are_not_refused():
    assert plan(4, resources__workers=3).workers == 3


def test_more_workers_than_fit_are_refused_with_the_number_that_fits():
    message = refusal(4, resources__workers=4)
    assert "resources.workers: 4 workers" in message
    assert "set resources.workers to at most 3" in message


def test_threads_of_a_worker_take_a_cpu_each():
    assert plan(9, resources__threads_per_worker=4).workers == 2
    message = refusal(9, resources__threads_per_worker=4, resources__workers=3)
    assert "4 CPU(s)" in message
    assert "at most 2" in message


def test_a_cluster_without_room_for_a_worker_is_refused():
    assert "do not fit" in refusal(1)
    assert "do not fit" in refusal(4, resources__threads_per_worker=8)


def test_a_gpu_for_every_worker():
    assert plan(17, gpus=4, resources__use_gpu=True).workers == 4
    message = refusal(17, gpus=4, resources__use_gpu=True, resources__workers=5)
    assert "short of GPUs" in message
    assert "at most 4" in message
    without = refusal(17, gpus=0, resources__use_gpu=True)
    assert "do not fit" in without and "set resources.use_gpu to false" in without


def test_workers_that_share_gpus():
    shared = {"resources__use_gpu": True, "resources__workers_per_gpu": 3}
    assert plan(17, gpus=4, **shared).workers == 12
    assert vars(plan(17, gpus=4, **shared))["workers_per_gpu"] == 3  # of which GPU-hours are told
    message = refusal(17, gpus=4, **shared, resources__workers=13)
    assert "13 workers with 1 CPU(s) and 1/3 GPU each" in message
    assert "short of GPUs" in message and "at most 12" in message
    made = config(**shared)
    assert [made.resources.gpus_of(workers) for workers in (1, 3, 4)] == [1, 1, 2]


def test_workers_that_share_a_gpu_share_its_room_for_saes():
    gib = 1 << 30
    assert room_on_gpu(80 * gib, 5 * gib) == 35 * gib
    assert room_on_gpu(80 * gib, 5 * gib, workers=4) == 5 * gib
    assert room_on_gpu(80 * gib, 5 * gib, workers=9) == 0


def test_data_parallel_workers_need_a_gpu_each():
    with pytest.raises(UserError, match="data-parallel workers need a GPU each"):
        config(resources__workers_per_gpu=2, resources__workers_per_trial=2)


def test_cpus_are_the_limit_where_there_are_more_gpus():
    made = plan(3, gpus=8, resources__use_gpu=True)
    assert made.workers == 2
    assert "short of CPUs" in refusal(3, gpus=8, resources__use_gpu=True, resources__workers=3)


def test_data_parallel_trials_take_a_group_of_workers():
    made = plan(9, resources__workers_per_trial=4)
    assert (made.workers, made.groups, made.concurrent_trials) == (8, 2, 2)


def test_cpus_that_fill_no_whole_group_stay_free():
    made = plan(11, resources__workers_per_trial=4)
    assert (made.workers, made.groups) == (8, 2)


def test_workers_that_cannot_be_divided_into_groups_are_refused():
    message = refusal(9, resources__workers=6, resources__workers_per_trial=4)
    assert "resources.workers_per_trial: 6 workers" in message
    assert "multiple of 4" in message


def test_a_group_larger_than_the_cluster_is_refused():
    assert "do not fit" in refusal(4, resources__workers_per_trial=8)


@pytest.mark.parametrize(("limit", "trials", "expected"), [(3, 24, 3), (None, 24, 8), (None, 2, 2)])
def test_trials_at_a_time_are_capped_by_the_limit_the_groups_and_the_trials(
    limit: int | None, trials: int, expected: int
):
    made = plan(9, search__max_concurrent=limit, search__num_samples=trials)
    assert made.concurrent_trials == expected


def test_no_more_trials_at_a_time_than_there_are_groups_of_workers():
    assert plan(9, search__max_concurrent=50).concurrent_trials == 8


# --- Trials that a worker trains together ---------------------------------------------------------


def test_packs_multiply_the_trials_at_a_time():
    made = plan(5, resources__trials_per_pack=3)
    assert (made.workers, made.groups, made.trials_per_pack) == (4, 4, 3)
    assert made.concurrent_trials == 12
    assert plan(5, resources__trials_per_pack=3, search__max_concurrent=5).concurrent_trials == 5


def test_a_cpu_trains_one_trial_at_a_time_unless_told_otherwise():
    assert plan(5).trials_per_pack == 1


@pytest.mark.parametrize(
    ("trials", "expected"),
    [(0.5, 1), (1.5, 1), (2.5, 2), (MOST_TRIALS, MOST_TRIALS), (99, MOST_TRIALS)],
)
def test_a_gpu_trains_as_many_trials_as_fit_its_memory(trials: float, expected: int):
    # Weights, gradients and moments of 131,712 parameters, activations of 1024 rows, the
    # confirmation's eight seeds; and one cosine matrix.
    trial = 8 * (4 * 4 * 131_712 + 6 * 4 * 1024 * (128 + 512))
    room = int(trials * trial) + 4 * 512**2 + 1
    free = {"CPU": 5.0, "GPU": 2.0}
    made = make_plan(config(resources__use_gpu=True), [free], local=True, gpu_bytes=room)
    assert made.trials_per_pack == expected
    assert made.concurrent_trials == 2 * expected


@pytest.mark.parametrize("searched", [[256, 2048], {"int": [256, 2048]}])
def test_where_the_width_is_searched_the_largest_sae_counts(searched: Any):
    made = config(**{"space__sae__d_sae": searched})
    assert memory_of_sae(made) == memory_of_sae(config(sae__d_sae=2048))
    assert memory_of_sae(made).weights == 4 * (2 * 128 * 2048 + 128 + 2048)
    plan = "\n".join(describe_plan(resolve(made)))
    assert "d_sae 256 to 2048, 65,920 to 526,464 parameters" in plan


def test_where_a_run_of_a_study_has_a_width_of_its_own_it_counts():
    wide = {"regularizer": {"name": "none"}, "sae": {"d_sae": 2048}}
    made = config(runs={"a": {"regularizer": {"name": "none"}}, "b": wide}, space=None, sae__k=4)
    assert memory_of_sae(made) == memory_of_sae(config(sae__d_sae=2048))


def test_data_parallel_trials_are_trained_one_at_a_time():
    settings = {"resources__use_gpu": True, "resources__workers_per_trial": 2}
    made = make_plan(config(**settings), [{"CPU": 5.0, "GPU": 2.0}], local=True, gpu_bytes=1 << 40)
    assert (made.trials_per_pack, made.concurrent_trials) == (1, 1)


# --- A pool that grows and shrinks with its cluster -----------------------------------------------


def on_cluster(*cpus: float, gpus: float = 0, **overrides: Any) -> Plan:
    """On nodes with so many free CPUs, and free GPUs each."""
    nodes = [{"CPU": n, "GPU": gpus} for n in cpus]
    return make_plan(config(**overrides), nodes, local=False)


def refused_on_cluster(*cpus: float, **overrides: Any) -> str:
    with pytest.raises(UserError) as caught:
        on_cluster(*cpus, **overrides)
    return str(caught.value)


def test_a_pool_of_this_machine_keeps_its_size():
    made = plan(5, resources__workers_per_trial=2, resources__max_workers=8)
    assert (made.pool_size, made.max_workers) == (4, 4)


def test_a_pool_of_a_cluster_goes_on_with_what_one_trial_takes():
    assert on_cluster(9).pool_size == (1, 8)
    assert on_cluster(9, resources__workers_per_trial=4).pool_size == (4, 8)


def test_a_pool_of_a_cluster_grows_as_far_as_it_may():
    made = on_cluster(3, resources__max_workers=6)
    assert (made.workers, made.pool_size, made.concurrent_trials) == (2, (1, 6), 6)


@pytest.mark.parametrize(("most", "per_trial"), [(3, 1), (6, 4)])
def test_a_limit_of_growth_that_cannot_be_reached_is_refused(most: int, per_trial: int):
    with pytest.raises(UserError, match=f"resources.max_workers: {most} must be at least"):
        on_cluster(5, resources__max_workers=most, resources__workers_per_trial=per_trial)


# --- A worker is on one node ----------------------------------------------------------------------


def test_a_worker_that_fits_no_node_is_refused_with_the_threads_that_fit():
    message = refused_on_cluster(2, 2, 2, 2, resources__threads_per_worker=4)
    assert "8 CPUs and 0 GPUs are free on 4 nodes, on one at most 2 and 0" in message
    assert "set resources.threads_per_worker to at most 2" in message
    assert on_cluster(2, 2, 2, 2, resources__threads_per_worker=2).workers == 3


def test_what_is_left_over_on_a_node_makes_no_worker_with_that_of_another():
    threads = {"resources__threads_per_worker": 4}
    assert on_cluster(7, 7, 6, **threads).workers == 3  # of 20 CPUs, beside the harvest
    assert on_cluster(8, 4, **threads).workers == 2  # 3 would leave no CPU for the harvest
    message = refused_on_cluster(7, 7, 6, **threads, resources__workers=4)
    assert "4 workers with 4 CPU(s) each" in message
    assert "set resources.workers to at most 3" in message


def test_gpus_and_cpus_must_be_on_the_same_node():
    gpu = {"resources__use_gpu": True, "resources__threads_per_worker": 2}
    nodes = [{"CPU": 2, "GPU": 4}, {"CPU": 32, "GPU": 0}]
    assert make_plan(config(**gpu), nodes, local=False).workers == 1
    with pytest.raises(UserError, match=r"set resources\.workers to at most 1"):
        make_plan(config(**gpu, resources__workers=2), nodes, local=False)
    nodes[0]["CPU"] = 1
    with pytest.raises(UserError, match=r"set resources\.threads_per_worker to at most 1"):
        make_plan(config(**gpu), nodes, local=False)
    nodes[0]["GPU"] = 0
    with pytest.raises(UserError, match=r"set resources\.use_gpu to false"):
        make_plan(config(**gpu), nodes, local=False)


def test_a_group_for_which_there_are_too_few_nodes_is_refused():
    settings = {"resources__threads_per_worker": 2, "resources__workers_per_trial": 4}
    message = refused_on_cluster(3, 3, 3, **settings)
    assert "room for 3 workers" in message
    assert "set resources.workers_per_trial to at most 3" in message


@pytest.mark.parametrize(
    ("free", "seconds"),
    [([{"CPU": 2.0}, {"CPU": 4.0}], 0.0), ([{"CPU": 2.0}], 5.0)],
    ids=["freed in time", "held by others"],
)
def test_cpus_that_others_hold_are_not_planned_with(
    free: list[dict[str, float]], seconds: float, monkeypatch: pytest.MonkeyPatch
):
    slept: list[float] = []
    looks = iter(free + [free[-1]] * 1000)
    alive = {"NodeID": "a", "Alive": True, "Resources": {"CPU": 4.0, "memory": 8.0}}
    monkeypatch.setattr("ray.nodes", lambda: [alive, alive | {"NodeID": "b", "Alive": False}])
    name = "ray._private.state.available_resources_per_node"
    monkeypatch.setattr(name, lambda: {"a": next(looks), "b": {"CPU": 9.0}})
    monkeypatch.setattr(cluster.time, "monotonic", lambda: sum(slept))
    monkeypatch.setattr(cluster.time, "sleep", slept.append)
    assert cluster._free_resources() == [{"CPU": free[-1]["CPU"], "GPU": 0.0}]
    assert sum(slept) >= seconds


# --- GPUs of this machine -------------------------------------------------------------------------


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An nvidia-smi that lists two, on eight cores."""
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 'NVIDIA A100, 40000'\necho 'NVIDIA A100, 39000'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))


@pytest.mark.usefixtures("two_gpus")
def test_a_worker_for_every_gpu_of_this_machine():
    gpu = {"resources__use_gpu": True, "resources__threads_per_worker": 2}
    assert cluster.local_resources(config(**gpu)) == {"CPU": 5, "GPU": 2}
    assert [g.free_bytes for g in cluster.list_gpus()] == [40000 << 20, 39000 << 20]


@pytest.mark.usefixtures("two_gpus")
def test_as_many_workers_on_every_gpu_of_this_machine_as_are_set():
    shared = {"resources__use_gpu": True, "resources__workers_per_gpu": 3}
    assert cluster.local_resources(config(**shared)) == {"CPU": 7, "GPU": 2}
    with pytest.raises(UserError, match="7 workers with 1/3 GPU each, and this machine has 2"):
        cluster.local_resources(config(**shared, resources__workers=7))


@pytest.mark.usefixtures("two_gpus")
def test_only_gpus_that_this_process_may_use_count(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert cluster.local_resources(config(resources__use_gpu=True))["GPU"] == 1
    with pytest.raises(UserError, match="2 workers with a GPU each, and this machine has 1"):
        cluster.local_resources(config(resources__use_gpu=True, resources__workers=2))


def test_a_machine_without_a_gpu_runs_no_search_that_wants_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cluster, "list_gpus", lambda: [])
    with pytest.raises(UserError, match="this machine has none; set"):
        start(config(resources__use_gpu=True), None, "namespace")


@pytest.mark.parametrize("gpus", [[], [Gpu("one", 80 << 30)]], ids=["none", "one"])
def test_a_gpu_is_taken_where_there_is_one_if_that_is_asked(
    gpus: list[Gpu], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cluster, "list_gpus", lambda: gpus)
    asked = config(resources__use_gpu="auto")
    made = resolve(asked)
    assert made.resources.use_gpu is made.resources.on_gpu is bool(gpus)
    assert cluster.local_resources(made)["GPU"] == len(gpus)
    # A cluster's are not known before it is joined: those of a driver without a GPU are taken.
    assert resolve(asked, "10.0.0.1:6379").resources.on_gpu
    for given in (True, False):
        assert resolve(config(resources__use_gpu=given)).resources.on_gpu is given
    with pytest.raises(UserError, match=r"resources.use_gpu: must be true, false or auto, got 'ye"):
        config(resources__use_gpu="yes")


def test_the_rehearsal_is_planned_on_a_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch):
    """As docs/real_study.md has it, «any machine»."""
    for module in (cluster, planning):
        monkeypatch.setattr(module, "list_gpus", lambda: [])
    monkeypatch.setattr("raysae.search.estimate._seconds_a_step", lambda *_: 0.01)
    lines = describe_plan(resolve(load_config(ORTH.with_name("pythia-70m.yaml"))))
    assert not any(line.startswith("not here") for line in lines)
    assert any(line.startswith("time ") for line in lines)


def test_a_machine_without_a_gpu_plans_for_one_that_has(monkeypatch: pytest.MonkeyPatch):
    for module in (cluster, planning):
        monkeypatch.setattr(module, "list_gpus", lambda: [])
    made = config(resources__use_gpu=True, resources__workers=4, resources__workers_per_trial=2)
    lines = describe_plan(resolve(made))
    (workers,) = (line for line in lines if line.startswith("workers "))
    assert "4, 2 a trial" in workers and "2 trials at a time" in workers
    assert lines[-1].startswith("not here     resources.use_gpu: 4 workers with a GPU each")
    assert not any(line.startswith("time ") for line in lines)


# --- What a GPU takes -----------------------------------------------------------------------------


def gpu_lines(monkeypatch: pytest.MonkeyPatch, made: RunConfig) -> tuple[str, str]:
    for module in (cluster, planning):
        monkeypatch.setattr(module, "list_gpus", lambda: [])
    monkeypatch.setattr(planning, "_world_here", lambda _: None)
    lines = describe_plan(made)
    (of_gpu,) = [line for line in lines if line.startswith("a GPU ")]
    (asking,) = [line for line in lines if line.startswith("asking ")]
    return of_gpu, asking


def test_a_model_that_is_not_here_is_counted_by_its_known_size(monkeypatch: pytest.MonkeyPatch):
    made = resolve(load_config(find_space("gemma-2-2b.yaml")))
    of_gpu, asking = gpu_lines(monkeypatch, made)
    sae, seeds = memory_of_sae(made), most_seeds(made)
    bytes_ = 2 * 2_614_341_888 + seeds * sae.total + 4 * made.extremes("sae", "d_sae")[1] ** 2
    assert f"about {human(bytes_)} of model, SAE and batch" in of_gpu
    assert "without its logits" in asking


def test_a_model_of_which_nothing_is_known_is_said_to_be_left_out(
    monkeypatch: pytest.MonkeyPatch,
):
    made = resolve(load_config(find_space("gemma-2-2b.yaml")))
    monkeypatch.setattr("raysae.worlds.presets.PARAMETERS", {})
    of_gpu, _ = gpu_lines(monkeypatch, made)
    assert "of SAE and batch, without the model" in of_gpu


def test_asking_what_a_model_knows_takes_another_one_and_its_logits(tmp_path: Path):
    made = config(resources__use_gpu=True, resources__workers_per_gpu=2)
    size = CorpusSize(1, 1000, 1, 500, longest_prompt=200)
    world = SimpleNamespace(
        known_questions=None, model_path=tmp_path, llm_batch_size=32, dtype="bfloat16"
    )
    (tmp_path / "config.json").write_text('{"vocab_size": 256000}')
    logits = 64 * 200 * 256_000 * 2
    assert planning._asking(made, size, world, 1 << 30) == 3 * (1 << 30) + logits
    assert planning._asking(made, None, world, 1 << 30) is None
    world.known_questions = {}
    assert planning._asking(made, size, world, 1 << 30) == 0
