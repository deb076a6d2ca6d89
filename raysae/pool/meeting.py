"""How the data-parallel workers of one machine find each other: through a file.

Ray's own backend has torch meet at a TCP store, which listens on every interface of the machine,
and asks nobody who he is. A cluster's workers have no other place; for those of one machine a file
will do, and what they then say to each other goes over the loopback interface.
"""

from __future__ import annotations

import os
import socket
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import torch.distributed as dist
from ray.train.backend import Backend
from ray.train.torch import TorchConfig


@dataclass
class MeetByFile(TorchConfig):
    """As `TorchConfig`, for workers of one machine; `folder` is one that they can write to."""

    folder: str = ""

    @property
    def backend_cls(self) -> type[Backend]:
        return _FileBackend


class _FileBackend(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        # Workers that are restarted must not find what those before them have left.
        meeting = Path(backend_config.folder) / f"meeting-{uuid.uuid4().hex}"
        worker_group.execute(_join, backend_config.backend, f"file://{meeting}")


def _join(backend: str, url: str) -> None:
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
    context = ray.train.get_context()
    dist.init_process_group(
        backend, url, rank=context.get_world_rank(), world_size=context.get_world_size()
    )
