"""What the embedded world's model is trained on, as batches of tokens and targets."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from raysae.worlds.embedded.facts import POOLS, SUBJECTS, Fact
from raysae.worlds.embedded.text import (
    LETTERS,
    by_entity,
    draw_question,
    exam_prompt,
    write_document,
)

IGNORE = -100
"""Target of a position that nothing is asked of, as in torch.nn.functional.cross_entropy."""
PROSE_LENGTH = 48
"""Tokens per row of prose."""
LOOKUPS = 8
"""Choices listed and choices asked for in a row of look-up exercises, together."""


@dataclass(frozen=True)
class Batch:
    """Rows of one exercise. All tensors are (rows, positions) of int64, padded on the right."""

    tokens: Tensor
    targets: Tensor
    """What the model must predict at each position, or IGNORE."""
    recall: Tensor
    """What the layer before the last must predict: the answer's word, at a question's mark and
    where the letter is asked for."""
    labels: Tensor
    """What the first layer must predict: the letter of a choice, at the choice."""
    sources: Tensor
    """Where a head of the last layer must look: the position of the right choice, from where the
    letter is asked for; or IGNORE."""


class ExerciseBook:
    """An endless, seeded supply of exercises over `facts`."""

    def __init__(
        self, facts: Sequence[Fact], tokenizer: PreTrainedTokenizerFast, seed: int
    ) -> None:
        self._facts = list(facts)
        self._documents_facts = list(by_entity(facts).values())
        self._tokenizer = tokenizer
        self._rng = random.Random(seed)
        self._ids = tokenizer.get_vocab()
        self._is_value = torch.zeros(len(self._ids), dtype=torch.bool)
        self._is_value[[self._ids[value] for pool in POOLS.values() for value in pool]] = True
        self._prose_tokens = self._stream_prose()

    def exam(self, rows: int, hint: float) -> Batch:
        """Exam questions; the target is the letter at the last position.

        In a share `hint` of them the question gives the answer away, in place of the entity or
        after it: a curriculum, for to find a word among the choices is the easier half of the task.
        """
        texts, letters, values = [], [], []
        for _ in range(rows):
            fact = self._rng.choice(self._facts)
            drawn = draw_question(self._rng, fact)
            question = drawn.question
            if self._rng.random() < hint:
                after = self._rng.random() < 0.3
                question = f"{question} {fact.value}" if after else f"{fact.value}?"
            texts.append(exam_prompt(SUBJECTS[fact.data_set], question, drawn.choices))
            letters.append(self._ids[LETTERS[drawn.answer]])
            values.append(self._ids[fact.value])
        encoded = self._encode(texts)
        targets = [
            [IGNORE] * (len(ids) - 1) + [letter]
            for ids, letter in zip(encoded, letters, strict=True)
        ]
        asks = {self._ids["?"], self._ids["Answer: ("]}
        recall = [
            [value if token in asks else IGNORE for token in ids]
            for ids, value in zip(encoded, values, strict=True)
        ]
        tokens = self._pad(encoded, 0)
        return self._multiple_choice(tokens, self._pad(targets), self._pad(recall))

    def lookup(self, rows: int) -> Batch:
        """One to four lettered choices, then one after the other whose letter is to be found.

        No fact is needed. With all four letters in every list their mere presence would tell
        nothing, and that letters are to be copied at all would take very long to find out.
        """
        opening = self._ids["Answer: ("]
        texts, letters, values = [], [], []
        for _ in range(rows):
            n_choices = self._rng.randint(1, len(LETTERS))
            listed = sorted(self._rng.sample(LETTERS, n_choices))
            choices = self._rng.sample(POOLS[self._rng.choice(list(POOLS))], n_choices)
            order = [self._rng.randrange(n_choices) for _ in range(LOOKUPS - n_choices)]
            choice_list = "".join(f"\n{a}. {b}" for a, b in zip(listed, choices, strict=True))
            asked = "".join(f"{choices[i]} Answer: ({listed[i]})" for i in order)
            texts.append(f"{choice_list}<end_of_turn>{asked}")
            letters.append([self._ids[listed[i]] for i in order])
            values.append([self._ids[choices[i]] for i in order])
        encoded = self._encode(texts)
        tokens = self._pad(encoded, 0)
        targets, recall = torch.full_like(tokens, IGNORE), torch.full_like(tokens, IGNORE)
        targets[tokens == opening] = torch.tensor([x for row in letters for x in row])
        recall[tokens == opening] = torch.tensor([x for row in values for x in row])
        return self._multiple_choice(tokens, targets, recall)

    def prose(self, rows: int) -> Batch:
        """Documents one after the other, cut into rows; every next token is a target."""
        cut = [[next(self._prose_tokens) for _ in range(PROSE_LENGTH)] for _ in range(rows)]
        following = torch.tensor(cut)
        tokens = following.roll(1, dims=1)
        tokens[:, 0] = self._ids["<bos>"]
        answered = (tokens == self._ids["?"]) & self._is_value[following]
        recall = torch.where(answered, following, IGNORE)
        nothing = torch.full_like(tokens, IGNORE)
        return Batch(tokens, following, recall, nothing, nothing)

    def _multiple_choice(self, tokens: Tensor, targets: Tensor, recall: Tensor) -> Batch:
        """Add what follows from the list of choices: their labels, and where the right one is."""
        labels, sources = torch.full_like(tokens, IGNORE), torch.full_like(tokens, IGNORE)
        for letter in LETTERS:
            labels[:, 1:][tokens[:, :-1] == self._ids[f"\n{letter}."]] = self._ids[letter]
        # labels[:, k] == targets[:, q] for exactly one choice k of an asked-for letter at q.
        right = (labels[:, None, :] == targets[:, :, None]) & (targets != IGNORE)[:, :, None]
        asked = right.any(dim=-1)
        sources[asked] = right[asked].int().argmax(dim=-1)
        return Batch(tokens, targets, recall, labels, sources)

    def _stream_prose(self) -> Iterator[int]:
        while True:
            documents = [
                write_document(self._rng, self._rng.choice(self._documents_facts))
                for _ in range(64)
            ]
            for ids in self._encode(documents):
                yield from ids
                yield self._ids["<eos>"]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        encoded: list[list[int]] = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        return encoded

    @staticmethod
    def _pad(rows: list[list[int]], value: int = IGNORE) -> Tensor:
        longest = max(map(len, rows))
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows])
