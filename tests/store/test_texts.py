"""Texts that are read in parts become the tokens that SAEBench makes of all of them at once."""

import json
import tracemalloc
from collections.abc import Iterator
from hashlib import sha256

import numpy as np
import pytest
from sae_bench.sae_bench_utils.dataset_utils import tokenize_and_concat_dataset
from transformers import AutoTokenizer

from raysae.store.texts import tokenize_texts
from raysae.worlds import load_world
from raysae.worlds.texts import sha256_of_texts


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(load_world("embedded").model_path)


class Lines:
    """Texts that are made as they are read, as a data set or a file would."""

    def __init__(self, texts: list[str], times: int = 1) -> None:
        self._texts, self._times = texts, times

    def __iter__(self) -> Iterator[str]:
        for _ in range(self._times):
            yield from (text[:-1] + text[-1:] for text in self._texts)


TEXTS = load_world("embedded").forget_texts


@pytest.mark.parametrize(
    "texts",
    [
        list(TEXTS[:200]),
        [" ".join(TEXTS[:300]), *TEXTS[300:305]],  # one text reaches over most of the parts
        [TEXTS[0]],
        list(TEXTS[:21]) + [""] * 7 + ["ü·α " * 9],
    ],
    ids=["many", "a long one", "one", "empty ones"],
)
@pytest.mark.parametrize("seq_len", [16, 64])
def test_the_tokens_are_those_of_saebench(tokenizer, texts: list[str], seq_len: int):
    wanted = tokenize_and_concat_dataset(tokenizer, texts, seq_len).numpy()
    found = tokenize_texts(tokenizer, Lines(texts), seq_len)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, wanted)


def test_texts_are_not_held_together():
    class Counting:
        """A tokenizer of one token a letter."""

        eos_token, bos_token_id, pad_token_id = "|", 0, -1

        def __call__(self, text: str) -> dict[str, np.ndarray]:
            return {"input_ids": np.zeros(len(text) // 1000, np.int32)}

    texts = Lines(["x" * 10_000], 2000)  # 20 MB
    tracemalloc.start()
    tokenize_texts(Counting(), texts, 10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6_000_000


def test_texts_that_can_be_read_once_only_are_refused(tokenizer):
    with pytest.raises(TypeError, match="read only once"):
        tokenize_texts(tokenizer, (text for text in TEXTS), 16)


@pytest.mark.parametrize("texts", [[], ["one"], ["one", 'tw"o', "α\n"]])
def test_the_checksum_of_texts_is_that_of_their_list_as_json(texts: list[str]):
    assert sha256_of_texts(Lines(texts)) == sha256(json.dumps(texts).encode()).hexdigest()
