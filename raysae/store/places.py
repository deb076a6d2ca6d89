"""Where harvesting tasks run: on which node, on which of its GPUs, and how many at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@dataclass(frozen=True)
class Place:
    """Of one task after another."""

    node: str | None = None
    """Ray's id; None: where Ray likes."""
    device: str = "cpu"

    def options(self) -> dict[str, Any]:
        """Of a task that runs there.

        It holds no GPU: all of them belong to workers for the whole search, and a task that waited
        for one would wait for ever, one that brings back what a lost node held included. Until the
        first batches can be had workers keep nothing but the language model on theirs, and a second
        copy of it beside that is what a harvest takes. In place of a node that is gone any other
        will do.
        """
        if self.node is None:
            return {"scheduling_strategy": "SPREAD"}
        where = NodeAffinitySchedulingStrategy(self.node, soft=True)
        if self.device == "cpu":
            return {"scheduling_strategy": where}
        # Processes with an environment of their own: or the next task would find its model on
        # another GPU, and load it again.
        own = {"env_vars": {"RAYSAE_HARVEST_DEVICE": self.device}}
        return {"scheduling_strategy": where, "runtime_env": own}


ANYWHERE = Place()


def harvest_places(nodes: Iterable[Mapping[str, Any]], *, use_gpu: bool, most: int) -> list[Place]:
    """One place on every node, or for every GPU: as many tasks run at a time.

    A second task on one node would take cores from the workers that start there (on two cores it
    delayed the first trial), and a second on one GPU gains nothing.

    Args:
        nodes: as `ray.nodes()` describes them.
        use_gpu: nodes without a GPU are left out then.
        most: GPUs that the search uses; as many places at most, on as many nodes as there are.
    """
    alive = [node for node in nodes if node["Alive"]]
    if not use_gpu:
        return [Place(node["NodeID"]) for node in alive if node["Resources"].get("CPU", 0) >= 1]
    gpus = [
        (index, node["NodeID"])
        for node in alive
        for index in range(int(node["Resources"].get("GPU", 0)))
    ]
    gpus.sort(key=lambda gpu: gpu[0])
    return [Place(node, f"cuda:{index}") for index, node in gpus[:most]]
