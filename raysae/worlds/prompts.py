"""How a multiple-choice question is put to a model: SAEBench's text inside a model's own frame.

The frame is what the tokenizer's chat template writes around a user's message; for gemma-2's
instruction-tuned models that is SAEBench's `GEMMA_INST_FORMAT`, character for character. A model
without a template gets SAEBench's plain form. Needs neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LETTERS = "ABCD"
ANSWERS = ("A", "B", "C", "D", " A", " B", " C", " D")
"""SAEBench's answer tokens; letter i is the better of i and i+4."""

_HEADER = "The following are multiple choice questions (with answers) about {subject}.\n"
_OPENING = "Answer: ("
"""Begun in the model's turn, so that the next token is the letter; as in SAEBench."""
_MARK = "raysae-message"
_DATE = "26 Jul 2024"
"""For templates that write the date of the day into the prompt: Llama 3's own default."""


@dataclass(frozen=True)
class PromptFormat:
    """What stands before and after the question and its choices."""

    name: str
    """``gemma-2`` (SAEBench's), ``chat`` or ``plain``."""
    before: str
    """Begins with the one beginning-of-sequence token."""
    after: str
    """The next token is the answer's letter."""

    def ask(
        self, subject: str, question: str, choices: Sequence[str], *, without_question: bool = False
    ) -> str:
        """The prompt; `without_question` lists the choices alone, as SAEBench does in one test."""
        listed = "".join(
            f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True)
        )
        asked = _HEADER.format(subject=subject) + question + listed
        return self.before + (listed[1:] if without_question else asked) + self.after


GEMMA_2 = PromptFormat(
    "gemma-2",
    "<bos><start_of_turn>user\n",
    f"<end_of_turn>\n<start_of_turn>model\n{_OPENING}",
)
"""SAEBench's for gemma-2-2b-it and gemma-2-9b-it."""


def plain(bos_token: str) -> PromptFormat:
    """SAEBench's text without a frame: the letter follows “Answer:”."""
    return PromptFormat("plain", bos_token, "\nAnswer:")


def prompt_format(tokenizer: Any, wanted: str) -> PromptFormat:
    """The format of a tokenizer.

    Args:
        tokenizer: a Hugging Face tokenizer with a beginning-of-sequence token.
        wanted: ``auto``, ``chat``, ``plain`` or ``gemma-2``.

    Raises ValueError for ``chat`` without a template, and for a template that does not hold a
    user's message in one piece.
    """
    if wanted == "gemma-2":
        return GEMMA_2
    if wanted == "plain" or (wanted == "auto" and not tokenizer.chat_template):
        return plain(tokenizer.bos_token)
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; valid: auto, plain, gemma-2")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": _MARK}],
        tokenize=False,
        add_generation_prompt=True,
        date_string=_DATE,
    )
    before, mark, after = text.partition(_MARK)
    if not mark or _MARK in after:
        raise ValueError("the tokenizer's chat template does not write a user's message once")
    if not before.startswith(tokenizer.bos_token):
        before = tokenizer.bos_token + before
    found = PromptFormat("chat", before, after + _OPENING)
    same = (found.before, found.after) == (GEMMA_2.before, GEMMA_2.after)
    return GEMMA_2 if same else found
