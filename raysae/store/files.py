"""Tensor files that can be trusted: safetensors, whole or not there at all, with checksums."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import prod
from pathlib import Path

import numpy as np
from safetensors import TensorSpec, serialize_file

from raysae.fsync import sync

_NUMPY = {
    "F64": np.float64, "F32": np.float32, "BF16": np.int16, "I16": np.int16, "I32": np.int32,
    "I64": np.int64, "BOOL": np.bool_,
}  # fmt: skip


class CorruptFileError(Exception):
    """A file does not hold what it should; the message names it and says what is wrong."""


def checksum(array: np.ndarray) -> str:
    """The sha256 (hex) of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def checksums(arrays: Iterable[np.ndarray]) -> list[str]:
    """`checksum` of each, on all cores of this process."""
    with ThreadPoolExecutor(cores(), "checksum") as threads:
        return list(threads.map(checksum, arrays))


def cores() -> int:
    """Of the machine, those that this process may run on."""
    return len(os.sched_getaffinity(0))


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], *, bfloat16: frozenset[str] = frozenset()
) -> None:
    """Write one safetensors file, complete and on the disk when it gets its name.

    Args:
        tensors: arrays by name.
        bfloat16: names of int16 arrays that hold bfloat16.

    Raises:
        OSError, safetensors.SafetensorError: it cannot be written; nothing is left behind.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    specs = {
        name: TensorSpec(
            dtype="bfloat16" if name in bfloat16 else array.dtype.name,
            shape=list(array.shape),
            data_ptr=array.ctypes.data,
            data_len=array.nbytes,
        )
        for name, array in arrays.items()
    }
    with replacing(path) as temporary:
        serialize_file(specs, temporary)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write to; the file becomes `path` when it is complete and on the disk.

    Who writes the same file at the same time does the same: the last one stays, whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def map_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read-only arrays over a mapped safetensors file, which stays mapped as long as they live.

    The library's own reader copies. bfloat16 comes as int16. Values are not checked, see `verify`.

    Raises:
        CorruptFileError: there is no such file, or it is not a whole one.
    """
    try:
        with path.open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        reason = error.strerror if isinstance(error, OSError) else "is empty"
        raise CorruptFileError(f"{path}: {reason}") from None
    try:
        start = 8 + int.from_bytes(memory[:8], "little")
        header = json.loads(memory[8:start])
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            dtype, shape = np.dtype(_NUMPY[entry["dtype"]]), tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            if end - begin != prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} has the wrong size")
            flat = np.frombuffer(memory, dtype, prod(shape), start + begin)
            tensors[name] = flat.reshape(shape)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(f"{path}: is not a whole safetensors file ({error})") from None
    return tensors


def verify(path: Path, tensors: Mapping[str, np.ndarray], wanted: Mapping[str, str]) -> None:
    """Compare with the checksums by name that were taken when the file was written.

    Raises:
        CorruptFileError: a tensor is missing, or is not what it was.
    """
    for name in wanted:
        if name not in tensors:
            raise CorruptFileError(f"{path}: holds no tensor {name!r}")
    for name, found in zip(wanted, checksums(tensors[name] for name in wanted), strict=True):
        if found != wanted[name]:
            raise CorruptFileError(f"{path}: tensor {name!r} is not what was written (checksum)")
