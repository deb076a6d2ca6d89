"""A file of the cache that all processes of a node map: one copy of it in the page cache.

A node that does not see the file, because its disk is its own, is sent it once, in pieces, into its
own cache. Its checksums are compared before anyone maps it, once on every node.
"""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysae.store.cache import cache_folder
from raysae.store.checked import has_been_checked, map_checked
from raysae.store.files import CorruptFileError, map_tensors, replacing, verify

log = logging.getLogger(__name__)

PIECE_BYTES = 64 << 20


@dataclass(frozen=True)
class MappedFile:
    """A file that is whole, and the node on which it lies."""

    path: Path
    node: str
    checksums: Mapping[str, str]
    """By tensor."""

    def open(self) -> dict[str, np.ndarray]:
        """Its tensors, read-only and mapped.

        Raises:
            CorruptFileError: it is gone, or not what was written.
            OSError: there is no room for it on a node that lacked it.
        """
        if self.path.is_file():
            return map_checked(self.path, self.checksums)
        return self._copy()

    def _copy(self) -> dict[str, np.ndarray]:
        """Of this node's own copy; who comes first makes it, the others wait."""
        cache = cache_folder("auto")
        assert cache is not None
        copy = cache / "copies" / self.path.parent.name / self.path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        with copy.with_name(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                return map_checked(copy, self.checksums)
            except CorruptFileError as error:
                if copy.exists():
                    log.warning("%s; it is sent again", error)
            self._fetch(copy)
            return map_checked(copy, self.checksums)

    def _fetch(self, copy: Path) -> None:
        on_its_node = NodeAffinitySchedulingStrategy(self.node, soft=False)
        read: Any = _read_piece.options(scheduling_strategy=on_its_node)
        with replacing(copy) as temporary:
            start = 0
            with temporary.open("wb") as file:
                while len(piece := ray.get(read.remote(str(self.path), start, PIECE_BYTES))):
                    file.write(piece)
                    start += len(piece)
            verify(copy, map_tensors(temporary), self.checksums)
        has_been_checked(copy, self.checksums)


@dataclass(frozen=True)
class MappedEvaluation:
    """An evaluation cache whose arrays are mapped: in place of the arrays in the object store."""

    file: MappedFile
    facts: Mapping[str, Any]


@ray.remote(num_cpus=0)
def _read_piece(path: str, start: int, length: int) -> np.ndarray:
    """So many bytes of a file of this task's node, uint8; fewer at its end, none behind it."""
    with Path(path).open("rb") as file:
        file.seek(start)
        return np.frombuffer(file.read(length), np.uint8)
