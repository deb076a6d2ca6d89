"""A word-level tokenizer for the embedded world, as a standard Hugging Face fast tokenizer."""

from __future__ import annotations

import re

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from raysae.worlds.embedded.facts import (
    FORGET_RELATIONS,
    POOLS,
    RETAIN_RELATIONS,
    SHARED_RELATIONS,
    SUBJECTS,
    SYLLABLES,
)
from raysae.worlds.embedded.text import (
    LETTERS,
    QUESTION_TEMPLATES,
    STATEMENT_TEMPLATES,
    exam_prompt,
)

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>", "<start_of_turn>", "<end_of_turn>")

# The first three alternatives keep the fixed parts of an exam question short: the header, a
# choice's letter and the answer's opening are one token each. Spaces are dropped.
_TOKEN = (
    r"The following are multiple choice questions \(with answers\) about"
    r"|\n[ABCD]\.|Answer: \(|\n|\w+|[^\w\s]"
)
_TOKEN_OR_SPECIAL = re.compile(r"<\w+>|" + _TOKEN)


def make_vocabulary() -> dict[str, int]:
    """Return all tokens and their ids, the special ones first, padded to a multiple of 8."""
    relations = [*FORGET_RELATIONS, *SHARED_RELATIONS]
    relations += [relation for group in RETAIN_RELATIONS.values() for relation in group]
    texts = [exam_prompt(subject, " ".join(SYLLABLES), [""] * 4) for subject in SUBJECTS.values()]
    texts += [
        template.format(relation="", entity="", value="")
        for template in (*QUESTION_TEMPLATES, *STATEMENT_TEMPLATES)
    ]
    texts += [" ".join(LETTERS) + " ( ) . , : ?"]
    texts += [relation.name for relation in relations]
    texts += [" ".join(values) for values in POOLS.values()]
    vocabulary = {token: i for i, token in enumerate(SPECIAL_TOKENS)}
    for text in texts:
        for token in _TOKEN_OR_SPECIAL.findall(text):
            vocabulary.setdefault(token, len(vocabulary))
    while len(vocabulary) % 8:
        vocabulary[f"<unused{len(vocabulary)}>"] = len(vocabulary)
    return vocabulary


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: pads on the right, adds no special token of its own accord."""
    backend = Tokenizer(WordLevel(make_vocabulary(), unk_token="<unk>"))
    backend.pre_tokenizer = Split(Regex(_TOKEN), behavior="removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<start_of_turn>", "<end_of_turn>"],
        padding_side="right",
    )
