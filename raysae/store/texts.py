"""Texts → token sequences, as SAEBench makes them, without ever holding all of the text.

A corpus may be larger than memory: a file, or a data set that is read from disk as it is iterated
over. It is gone through twice, and what is kept of it are its tokens, 4 bytes each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

PARTS = 20
"""SAEBench cuts the whole text into so many parts, wherever that is, and tokenises each."""


def tokenize_texts(tokenizer: Any, texts: Iterable[str], seq_len: int) -> np.ndarray:
    """Token ids, int32 (sequences, seq_len), each sequence beginning with BOS.

    Equal to SAEBench's `tokenize_and_concat_dataset` of the list of all texts, of which no more
    than a twentieth is held at a time.

    Args:
        tokenizer: of Hugging Face, with EOS, BOS and PAD.
        texts: the same at every iteration.
        seq_len: tokens of a sequence; a last one that is shorter is dropped.

    Raises:
        TypeError: `texts` is an iterator, which can be gone through only once.
    """
    if iter(texts) is texts:
        raise TypeError(
            f"texts of the type {type(texts).__name__} can be read only once, and are read for "
            "their length, their tokens and their checksum; give a list, a data set, or an object "
            "with __iter__ that begins anew"
        )
    found = []
    for part in _parts(tokenizer.eos_token, texts):
        ids = np.asarray(tokenizer(part)["input_ids"], dtype=np.int32)
        found.append(ids[ids != tokenizer.pad_token_id])
    tokens = np.concatenate(found)
    sequences = len(tokens) // seq_len
    cut: np.ndarray = tokens[: sequences * seq_len].reshape(sequences, seq_len)
    cut[:, 0] = tokenizer.bos_token_id
    return cut


def _parts(separator: str, texts: Iterable[str]) -> Iterator[str]:
    """`separator.join(texts)`, cut into `PARTS` of equal length, of which the last may be empty."""
    lengths = [len(text) for text in texts]
    whole = sum(lengths) + len(separator) * max(0, len(lengths) - 1)
    length = (whole - 1) // PARTS + 1
    yielded, held, buffer = 0, 0, list[str]()
    for i, text in enumerate(texts):
        piece = text if i == 0 else separator + text
        buffer.append(piece)
        held += len(piece)
        if held >= length:
            joined = "".join(buffer)
            while len(joined) >= length and length:
                yield joined[:length]
                yielded, joined = yielded + 1, joined[length:]
            buffer, held = [joined], len(joined)
    rest = "".join(buffer)
    for _ in range(yielded, PARTS):
        yield rest[:length]
        rest = rest[length:]
