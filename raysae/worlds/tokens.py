"""A padding token for tokenizers without one, and not the one that begins a sequence.

SAEBench pads prompts on the right, counts the beginnings of sequences, and drops padding from the
corpora: a padding token that is also the beginning or the end of a text would be miscounted.
"""

from __future__ import annotations

from typing import Any

USUAL = (
    "<|padding|>",  # GPT-NeoX, Pythia
    "<|finetune_right_pad_id|>",  # Llama 3.1 and later
    "<|reserved_special_token_0|>",  # Llama 3
    "<pad>",
    "[PAD]",
    "<unk>",  # Llama 2
)


def with_padding(tokenizer: Any, wanted: str | None = None) -> str | None:
    """Give a Hugging Face tokenizer a padding token of its own.

    Args:
        tokenizer: changed in place.
        wanted: the token to take; None: the tokenizer's own, or the first of `USUAL` it has.

    Returns:
        The token, or None where the tokenizer's own serves.

    Raises ValueError for a wanted token that is not in the vocabulary, and where none is found.
    """
    taken = (tokenizer.bos_token, tokenizer.eos_token)
    vocabulary = tokenizer.get_vocab()
    if wanted is not None:
        if wanted not in vocabulary or wanted in taken:
            raise ValueError(
                f"pad_token {wanted!r} is not in the vocabulary, or begins or ends texts "
                f"({', '.join(map(repr, taken))})"
            )
        tokenizer.pad_token = wanted
        return wanted
    if tokenizer.pad_token is not None and tokenizer.pad_token not in taken:
        return None
    for token in USUAL:
        if token in vocabulary and token not in taken:
            tokenizer.pad_token = token
            return token
    raise ValueError(
        "the tokenizer has no padding token other than those that begin and end texts; name one of "
        f"its vocabulary that texts never hold as world.pad_token (looked for {', '.join(USUAL)})"
    )
