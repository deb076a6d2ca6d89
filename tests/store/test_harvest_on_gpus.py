"""A harvest beside workers that hold every GPU of a cluster: on GPU nodes only, and to its end."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysae.store.activations import local_store
from raysae.store.harvest import harvest
from raysae.store.places import harvest_places
from raysae.worlds import load_world
from raysae.worlds.model import load_model

pytestmark = [pytest.mark.ray, pytest.mark.slow]
HOOK = "blocks.0.hook_resid_post"


@ray.remote(num_gpus=1, num_cpus=0)
class Worker:
    """Holds a GPU, as a worker does for the whole search."""

    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without a GPU and two nodes with two each, which only Ray believes in."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    for _ in range(2):
        made.add_node(num_cpus=1, num_gpus=2, object_store_memory=200 << 20)
    ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
    made.wait_for_nodes()
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.mark.usefixtures("cluster")
def test_tasks_run_on_the_nodes_with_gpus_while_workers_hold_them_all():
    workers = [Worker.remote() for _ in range(4)]
    with_gpus = set(ray.get([worker.node.remote() for worker in workers]))
    assert ray.available_resources().get("GPU", 0) == 0

    places = harvest_places(ray.nodes(), use_gpu=True, most=4)
    assert len(places) == 4 and {place.node for place in places} == with_gpus
    found = harvest("embedded", [HOOK], "float32", evaluation_cache=False, places=places)
    store = found.stores[HOOK]
    assert "harvested, 4 at a time on" in found.lines[-1]

    from ray.util.state import list_tasks

    tasks = list_tasks(filters=[("name", "=", "harvest_piece")], detail=True)
    assert len(tasks) == 4
    assert {task.node_id for task in tasks} == with_gpus
    assert len({task.worker_pid for task in tasks}) == len(places)

    world = load_world("embedded")
    wanted = local_store(world, load_model(world), HOOK)
    np.testing.assert_array_equal(np.concatenate(store.arrays()), np.concatenate(wanted._chunks))


def test_what_a_lost_node_held_is_computed_again_while_workers_hold_the_gpus(cluster: Cluster):
    places = harvest_places(ray.nodes(), use_gpu=True, most=4)
    store = harvest("embedded", [HOOK], "float32", evaluation_cache=False, places=places).stores[
        HOOK
    ]
    lost = next(n for n in cluster.worker_nodes if n.node_id == places[1].node)
    left = next(n for n in cluster.worker_nodes if n is not lost)
    here = NodeAffinitySchedulingStrategy(left.node_id, soft=False)
    workers = [Worker.options(scheduling_strategy=here).remote() for _ in range(2)]
    ray.get([worker.node.remote() for worker in workers])
    cluster.remove_node(lost, allow_graceful=False)

    world = load_world("embedded")
    wanted = local_store(world, load_model(world), HOOK)
    np.testing.assert_array_equal(np.concatenate(store.arrays()), np.concatenate(wanted._chunks))
