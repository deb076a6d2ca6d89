"""More activations than shared memory: spilled and read back, or one clear message."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ray

from raysae.store.chunks import Moments
from raysae.store.files import checksum
from raysae.store.handle import HeldChunk, StoreHandle

pytestmark = pytest.mark.ray
ROWS, WIDTH = 16_384, 256  # 16 MiB a chunk
QUIET = {
    "address": "local",
    "include_dashboard": False,
    "log_to_driver": False,
    "logging_level": "ERROR",
}


@ray.remote
def made_chunk(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((ROWS, WIDTH), dtype=np.float32)


def test_chunks_beyond_the_object_store_are_spilled_and_read_back():
    ray.init(num_cpus=1, object_store_memory=80 << 20, **QUIET)
    try:
        refs = [made_chunk.remote(seed) for seed in range(10)]  # twice what there is room for
        ray.wait(refs, num_returns=len(refs))
        one = Moments(ROWS, np.zeros(WIDTH), ROWS * 16.0, ROWS * 256.0)
        origin = ray.put(np.zeros((2, ROWS), np.int32))
        for seed, ref in enumerate(refs):
            store = StoreHandle(
                chunks=(HeldChunk(ref, origin, ""),),
                is_forget=np.zeros(ROWS, bool),
                moments={"all": one},
                evaluation_cache=None,
                nbytes=ROWS * WIDTH * 4,
            )
            wanted = np.random.default_rng(seed).standard_normal((ROWS, WIDTH), dtype=np.float32)
            (array,) = store.arrays()
            assert checksum(array) == checksum(wanted)
            del array
    finally:
        ray.shutdown()


FULL = """
import sys
import ray
from raysae.store.harvest import StoreFullError, harvest
# Ray takes its disk for full when more than 0.1 percent of it are in use.
ray.init(
    "local", num_cpus=1, object_store_memory=80 << 20, include_dashboard=False, log_to_driver=False,
    _system_config={"local_fs_capacity_threshold": 0.001, "local_fs_monitor_interval_ms": 10},
)
hooks = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "blocks.2.hook_resid_post"]
try:
    harvest("embedded", hooks, "float32", evaluation_cache=False)
except StoreFullError as error:
    print(error)
ray.shutdown()
"""


@pytest.mark.slow
def test_no_room_in_memory_or_on_disk_is_one_clear_message(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", FULL],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=tmp_path,
    )
    (line,) = done.stdout.splitlines()
    assert "do not fit" in line, done.stderr
    assert "object store has 80.0 MiB" in line
    assert "resources.store_dtype=bfloat16" in line
