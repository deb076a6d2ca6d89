"""What the cache on disk holds of a store: a file a chunk, and the evaluation cache in one."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from raysae.store.cache import Entry, FileRecord
from raysae.store.chunks import Chunk, Moments, Piece, StoreDtype

CannotWrite = (OSError, SafetensorError)
"""What writing to the cache raises when the disk is full, or the folder not ours."""

PlainCache = tuple[Mapping[str, np.ndarray], Mapping[str, Any]]
"""Arrays and facts of `raysae.unlearning.EvaluationCache.to_plain`."""


def list_chunks(entry: Entry) -> dict[Piece, FileRecord]:
    """The files of a store's entry, in the order of its rows; {} when there is none.

    Raises:
        CorruptFileError: the manifest is not what was written.
    """
    manifest = entry.read()
    if manifest is None:
        return {}
    return {Piece(**record.about): record for record in manifest[0]}


def load_chunk(entry: Entry, record: FileRecord) -> Chunk:
    """A chunk over its mapped file, compared with its checksums.

    Raises:
        CorruptFileError: the file is missing, truncated, or not what was written.
    """
    tensors = entry.load(record)
    norm, norm2 = tensors["norms"].tolist()
    acts = tensors["activations"]
    return Chunk(
        acts,
        tensors["tokens"],
        tensors["positions"],
        Moments(len(acts), tensors["sum"], norm, norm2),
    )


def save_chunk(entry: Entry, piece: Piece, chunk: Chunk, dtype: StoreDtype) -> FileRecord:
    """Write a chunk's file.

    Raises:
        OSError, safetensors.SafetensorError: it cannot be written.
    """
    check_room(entry.folder, chunk.activations.nbytes)
    tensors = {
        "activations": chunk.activations,
        "tokens": chunk.tokens,
        "positions": chunk.positions,
        "sum": chunk.moments.x,
        "norms": np.array([chunk.moments.norm, chunk.moments.norm2]),
    }
    bits = frozenset({"activations"} if dtype == "bfloat16" else ())
    return entry.write(f"{piece.corpus}-{piece.start:08}", tensors, asdict(piece), bfloat16=bits)


def load_evaluation(entry: Entry) -> tuple[FileRecord, PlainCache] | None:
    """An evaluation cache over its mapped file, and that file; None when there is none.

    Raises:
        CorruptFileError: manifest or file are not what was written.
    """
    manifest = entry.read()
    if manifest is None:
        return None
    (record,), facts = manifest
    return record, (entry.load(record), facts)


def save_evaluation(entry: Entry, cache: PlainCache) -> FileRecord:
    """Write the whole entry of an evaluation cache; its file.

    Raises:
        OSError, safetensors.SafetensorError: it cannot be written.
    """
    arrays, facts = cache
    check_room(entry.folder, sum(array.nbytes for array in arrays.values()))
    record = entry.write("evaluation", arrays, {})
    entry.publish([record], dict(facts))
    return record


def check_room(folder: Path, needed: int) -> None:
    """Raise OSError (disk full) before a byte is written, if so many have no room there."""
    while not folder.exists():
        folder = folder.parent
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
