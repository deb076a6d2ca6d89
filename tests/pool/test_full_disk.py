"""What libraries raise on a disk that is full, and that nothing half-written stays."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from raysae.errors import no_room

FILL = """
import sys
from pathlib import Path
import numpy as np
from raysae.errors import no_room
from raysae.store.batches import ChunkedActivations
from raysae.training.checkpoint import Checkpoints
from raysae.training.run import SAERun
from raysae.training.spec import TrialSpec

disk = Path(sys.argv[1])
rows = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
labels, mean = np.arange(64) % 3 == 0, rows.mean(0)
store = ChunkedActivations([rows], labels, scale=1.0, mean=mean, variance=64.0)
spec = TrialSpec(
    number=0, seed=1, sae={"architecture": "topk", "d_sae": 1024, "k": 4},
    training={"tokens": 64, "batch_size": 32}, regularizer={"name": "none"}, rungs=(64,),
)
run = SAERun(spec, store)
run.advance()
checkpoints = Checkpoints(disk)
writes = {"checkpoint": lambda: checkpoints.save([run]),
          "SAE": lambda: run.export().save_model(disk / "sae")}
writes["checkpoint"]()  # 1.6 of 2 MiB: there is no room for another beside it
for name, write in writes.items():
    try:
        write()
    except Exception as error:
        print(name, type(error).__name__, "No space left on device" in no_room(error))
print(sorted(path.name for path in disk.iterdir() if path.is_file()))
fresh = SAERun(spec, store)
print(checkpoints.restore([fresh]), fresh.step)
"""


def on_a_small_disk(folder: Path, code: str) -> list[str] | None:
    """What a program prints that is given a disk of 2 MiB; None where no disk can be had."""
    shell = 'mount -t tmpfs -o size=2m tmpfs "$1" 2>/dev/null || exit 77; exec "$2" -c "$3" "$1"'
    unshare = shutil.which("unshare")
    if unshare is None:
        return None
    # In namespaces of its own, where any user may mount and nobody else sees it.
    command = [unshare, "--user", "--map-root-user", "--mount", "sh", "-c", shell, "sh"]
    command += [str(folder), sys.executable, code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode == 77 or "unshare" in done.stderr:
        return None
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_disk_that_is_full_is_told_from_other_errors_and_keeps_the_checkpoint(tmp_path: Path):
    lines = on_a_small_disk(tmp_path, FILL)
    if lines is None:
        pytest.skip("nobody may mount a disk here")
    assert lines == [
        "checkpoint RuntimeError True",
        "SAE SafetensorError True",
        "['checkpoint.pt']",
        "True 1",
    ]


def hidden() -> Exception:
    """An error that came while a full disk was dealt with, as torch's does."""
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "any language"), "No space left on device"),
        (OSError(errno.EDQUOT, "any language"), "Disk quota exceeded"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "No space left"),
        (hidden(), "No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied"), ""),
        (RuntimeError("unexpected pos 64 vs 0"), ""),
        (ValueError("loss is nan"), ""),
    ],
    ids=str,
)
def test_a_full_disk_is_found_behind_other_errors_and_nowhere_else(error: Exception, words: str):
    assert words in no_room(error)
    assert bool(no_room(error)) == bool(words)
