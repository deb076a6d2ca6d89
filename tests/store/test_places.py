"""Harvesting tasks run where the search's workers are, and hold nothing that a worker needs."""

from __future__ import annotations

from typing import Any

from raysae.store.places import ANYWHERE, Place, harvest_places


def node(name: str, cpus: int = 0, gpus: int = 0, *, alive: bool = True) -> dict[str, Any]:
    resources = {"CPU": float(cpus), "GPU": float(gpus), "memory": 1e9}
    return {"NodeID": name, "Alive": alive, "Resources": {k: v for k, v in resources.items() if v}}


def test_one_task_at_a_time_on_every_node_that_has_cpus():
    assert harvest_places([node("a", cpus=64)], use_gpu=False, most=32) == [Place("a")]
    nodes = [node("head"), node("a", 8), node("b", 8, gpus=1), node("lost", 8, alive=False)]
    assert harvest_places(nodes, use_gpu=False, most=16) == [Place("a"), Place("b")]


def test_one_task_at_a_time_for_every_gpu_and_none_on_nodes_without():
    nodes = [node("head", 8), node("a", 8, gpus=2), node("b", 8, gpus=1)]
    places = harvest_places(nodes, use_gpu=True, most=3)
    assert places == [Place("a", "cuda:0"), Place("b", "cuda:0"), Place("a", "cuda:1")]


def test_no_more_gpus_than_the_search_has_workers_spread_over_the_nodes():
    nodes = [node("a", 64, gpus=8), node("b", 64, gpus=8)]
    places = harvest_places(nodes, use_gpu=True, most=4)
    assert [(p.node, p.device) for p in places] == [
        ("a", "cuda:0"), ("b", "cuda:0"), ("a", "cuda:1"), ("b", "cuda:1")
    ]  # fmt: skip


def test_a_task_asks_for_no_resource():
    for place in (ANYWHERE, Place("a" * 56), Place("a" * 56, "cuda:1")):
        assert place.options().keys() <= {"scheduling_strategy", "runtime_env"}


def test_a_process_keeps_to_one_gpu_and_goes_elsewhere_when_its_node_is_lost():
    first, second = (Place("a" * 56, f"cuda:{i}").options() for i in range(2))
    assert first["runtime_env"] != second["runtime_env"]
    assert first["scheduling_strategy"].soft
    assert "runtime_env" not in Place("a" * 56).options()
