"""Whether the store is at the end what it was when it was harvested, wherever copies of it lie."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.experimental import get_object_locations
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysae.store.files import CorruptFileError, map_tensors, verify
from raysae.store.handle import HeldChunk, StoreHandle, different

PATIENCE_SECONDS = 300.0
"""For other nodes; a gigabyte takes one thread a second or two."""


@dataclass(frozen=True)
class Compared:
    """Copies of chunks that were compared with their checksums."""

    copies: int
    """Of chunks, on all nodes together."""
    nodes: int
    problems: tuple[str, ...]
    """What is not as it was, in words."""


def compare_copies(store: StoreHandle) -> Compared:
    """Hash every copy of every chunk on the node where it lies: nothing crosses between nodes.

    What has no copy in any node's memory now, because Ray has spilled it or its node was lost, is
    not fetched for it.

    Args:
        store: whose chunks are to be compared, files on this machine.

    Raises:
        ray.exceptions.RayError: a node was lost meanwhile, or does not answer.
    """
    on_disk = [chunk for chunk in store.chunks if isinstance(chunk.place, Path)]
    in_memory = {c.place: c for c in store.chunks if not isinstance(c.place, Path)}
    here = str(ray.get_runtime_context().get_node_id())
    by_node: dict[str, list[HeldChunk]] = defaultdict(list)
    for place, where in get_object_locations(list(in_memory)).items():
        for node in where["node_ids"]:
            by_node[node].append(in_memory[place])
    elsewhere = {
        node: _compare.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        ).remote(chunks)
        for node, chunks in by_node.items()
        if node != here
    }
    problems = _damaged(on_disk) + _different(by_node.get(here, []))
    told = ray.get(list(elsewhere.values()), timeout=PATIENCE_SECONDS)
    for node, words in zip(elsewhere, told, strict=True):
        problems += [f"{word} on node {node}" for word in words]
    copies = len(on_disk) + sum(map(len, by_node.values()))
    nodes = len(by_node.keys() | ({here} if on_disk else set()))
    return Compared(copies, nodes, tuple(problems))


def _different(chunks: list[HeldChunk]) -> list[str]:
    return different(chunks, ray.get([c.place for c in chunks if not isinstance(c.place, Path)]))


def _damaged(chunks: list[HeldChunk]) -> list[str]:
    problems = []
    for chunk in chunks:
        assert isinstance(chunk.place, Path)
        try:
            verify(chunk.place, map_tensors(chunk.place), {"activations": chunk.sha256})
        except CorruptFileError as error:
            problems.append(str(error))
    return problems


@ray.remote(num_cpus=0)
def _compare(chunks: list[HeldChunk]) -> Any:
    """`different` of this task's node's copies."""
    return _different(chunks)
