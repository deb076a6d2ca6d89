"""The cache on disk: what a search has computed once, found again by the next one.

An entry is a folder named by its key: everything that decides the numbers. Its files are named by
their contents and listed, with checksums, in a manifest that is written last; so an entry is there
as a whole or not at all, and two searches that write the same one at the same time do not meet.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from raysae.store.chunks import StoreDtype
from raysae.store.files import (
    CorruptFileError,
    checksum,
    map_tensors,
    replacing,
    verify,
    write_tensors,
)
from raysae.worlds.texts import sha256_of_texts
from raysae.worlds.world import World, sha256_of_file

MANIFEST = "manifest.json"
LIBRARIES = ("torch", "transformers", "tokenizers", "transformer-lens", "sae-bench", "numpy")
_PACKAGE = Path(__file__).resolve().parent.parent


def cache_folder(setting: str | None) -> Path | None:
    """The folder of `resources.cache`: a path, "auto" for the user's own, or None for no cache.

    The user's own is $RAYSAE_CACHE, or raysae in $XDG_CACHE_HOME or ~/.cache.
    """
    if setting is None:
        return None
    if setting != "auto":
        return Path(setting).expanduser().absolute()
    if os.environ.get("RAYSAE_CACHE"):
        return Path(os.environ["RAYSAE_CACHE"]).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raysae"


def activations_key(world: World, hook_name: str, dtype: StoreDtype) -> dict[str, Any]:
    """Everything that decides a world's activations at a hook, and their order."""
    return {
        "model": world.model_fingerprint(),
        "forget": sha256_of_texts(world.training_texts.get("forget", world.forget_texts)),
        "retain": sha256_of_texts(world.training_texts.get("retain", world.retain_texts)),
        "seq_len": world.seq_len,
        "tokens": world.store_tokens,
        "hook": hook_name,
        "dtype": dtype,
        **_what_computes(
            "store/activations.py", "store/chunks.py", "store/texts.py", "worlds/model.py"
        ),
    }


def evaluation_key(world: World, hook_name: str) -> dict[str, Any]:
    """Everything that decides a world's evaluation cache at a hook."""
    known = None if world.known_questions is None else dict(world.known_questions)
    return {
        "world": world.fingerprint(),
        "known_questions": hashlib.sha256(json.dumps(known).encode()).hexdigest(),
        "hook": hook_name,
        **_what_computes(
            "unlearning/cache.py", "unlearning/protocol.py", "worlds/model.py", "worlds/prompts.py"
        ),
    }


def known_key(world: World) -> dict[str, Any]:
    """Everything that decides which questions a world's model knows."""
    return {
        "questions": world.questions_fingerprint(),
        **_what_computes("unlearning/known.py", "unlearning/protocol.py", "worlds/model.py"),
    }


def _what_computes(*sources: str) -> dict[str, Any]:
    return {
        "machine": platform.machine(),
        "versions": {name: version(name) for name in LIBRARIES},
        # Of the code, so that nobody has to remember to count up a version.
        "code": {name: sha256_of_file(_PACKAGE / name) for name in sources},
    }


@dataclass(frozen=True)
class FileRecord:
    """One file of an entry, as the manifest lists it."""

    name: str
    checksums: dict[str, str]
    """By tensor."""
    about: dict[str, Any]
    """What its writer wants to know of it without opening it."""


@dataclass(frozen=True)
class Entry:
    """One entry of the cache, which may not be there yet."""

    folder: Path
    key: dict[str, Any]

    @classmethod
    def at(cls, cache: Path, kind: str, key: dict[str, Any]) -> Entry:
        """The entry of that key below `cache`/`kind`."""
        return cls(cache / kind / _digest(key)[:24], key)

    def read(self) -> tuple[list[FileRecord], dict[str, Any]] | None:
        """Files and facts of the manifest; None when there is none.

        Raises:
            CorruptFileError: the manifest is not what was written.
        """
        path = self.folder / MANIFEST
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise CorruptFileError(f"{path}: cannot be read ({error})") from None
        try:
            manifest = json.loads(text)
            body = {name: manifest[name] for name in ("key", "facts", "files")}
            if manifest["sha256"] != _digest(body):
                raise ValueError("wrong checksum")
            if body["key"] != self.key:
                raise ValueError("another key")
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptFileError(f"{path}: is not what was written ({error})") from None
        return [FileRecord(**file) for file in body["files"]], body["facts"]

    def load(self, record: FileRecord) -> dict[str, np.ndarray]:
        """The tensors of a file, mapped, read-only, and compared with their checksums.

        Raises:
            CorruptFileError: the file is missing, truncated, or not what was written.
        """
        path = self.path(record)
        tensors = map_tensors(path)
        verify(path, tensors, record.checksums)
        return tensors

    def path(self, record: FileRecord) -> Path:
        """Where the file lies."""
        return self.folder / record.name

    def write(
        self,
        label: str,
        tensors: Mapping[str, np.ndarray],
        about: dict[str, Any],
        *,
        bfloat16: frozenset[str] = frozenset(),
    ) -> FileRecord:
        """Write a file of the entry, which is not part of it before `publish`.

        Raises:
            OSError, safetensors.SafetensorError: it cannot be written.
        """
        checksums = {name: checksum(array) for name, array in tensors.items()}
        record = FileRecord(f"{label}-{_digest(checksums)[:8]}.safetensors", checksums, about)
        write_tensors(self.path(record), tensors, bfloat16=bfloat16)
        return record

    def publish(self, files: list[FileRecord], facts: dict[str, Any]) -> None:
        """Write the manifest: from now on the entry is found.

        Raises:
            OSError: it cannot be written.
        """
        body = {"key": self.key, "facts": facts, "files": [asdict(record) for record in files]}
        text = json.dumps(body | {"sha256": _digest(body)}, indent=1)
        with replacing(self.folder / MANIFEST) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
