"""The texts of a corpus: in memory, or read from disk again each time they are gone through."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Protocol


class Texts(Protocol):
    """The same at every iteration, of which there may be many."""

    def __iter__(self) -> Iterator[str]: ...

    def __len__(self) -> int: ...


class TextsOnDisk(ABC):
    """Texts of which one is held at a time; number and checksum are kept once they are known."""

    @abstractmethod
    def __iter__(self) -> Iterator[str]:
        """From the first one on, read anew."""

    @cached_property
    def summary(self) -> tuple[int, str]:
        """Their number and `sha256_of_texts`."""
        n, digest = 0, _Digest()
        for text in self:
            digest.add(text)
            n += 1
        return n, digest.hex()

    def __len__(self) -> int:
        return self.summary[0]


class _Digest:
    """Of a list of texts as JSON, text by text."""

    def __init__(self) -> None:
        self._sha256, self._separator = hashlib.sha256(b"["), ""

    def add(self, text: str) -> None:
        self._sha256.update((self._separator + json.dumps(text)).encode())
        self._separator = ", "

    def hex(self) -> str:
        self._sha256.update(b"]")
        return self._sha256.hexdigest()


def sha256_of_texts(texts: Iterable[str]) -> str:
    """Return the sha256 (hex) of a list of texts, their order and their borders included.

    That of the list as JSON, of which one text is held at a time.
    """
    if isinstance(texts, TextsOnDisk):
        return texts.summary[1]
    digest = _Digest()
    for text in texts:
        digest.add(text)
    return digest.hex()
