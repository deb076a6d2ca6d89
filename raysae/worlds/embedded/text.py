"""The facts as text: prose, exam questions in SAEBench's format, and the two corpora."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raysae.worlds.embedded.facts import POOLS, SUBJECTS, Fact
from raysae.worlds.world import FORGET_SET, Question

LETTERS = "ABCD"
QUESTION_TEMPLATES = (
    "What is the {relation} of {entity}?",
    "Which {relation} belongs to {entity}?",
)
STATEMENT_TEMPLATES = ("The {relation} of {entity} is {value}.", "{entity}: {relation} {value}.")

# SAEBench's text for gemma-2-2b-it: sae_bench/evals/unlearning/utils/var.py and
# metrics.convert_wmdp_data_to_prompt.
_HEADER = "The following are multiple choice questions (with answers) about {subject}.\n"
_CHAT = "<bos><start_of_turn>user\n{prompt}<end_of_turn>\n<start_of_turn>model\n"


@dataclass(frozen=True)
class CorpusConfig:
    """What the two corpora hold."""

    documents: int = 1500
    """Documents per corpus."""
    exam_share: float = 0.3
    """Share of the retain corpus that is exam questions on retained subjects. Without them every
    feature of the questions' format is rare in it, passes for knowledge to forget, and clamping it
    breaks all answers alike."""
    leak: float = 0.004
    """Share of the retain corpus' prose that is about the domain to forget, as real retain corpora
    are never quite free of it."""
    seed: int = 2


def exam_prompt(subject: str, question: str, choices: Sequence[str]) -> str:
    """Return the prompt whose next token is the answer's letter, as SAEBench writes it."""
    listed = "".join(
        f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True)
    )
    prompt = _HEADER.format(subject=subject) + question + listed
    return _CHAT.format(prompt=prompt) + "Answer: ("


def draw_question(rng: random.Random, fact: Fact) -> Question:
    """Ask for a fact: a random template, three random wrong choices, a random order."""
    pool = POOLS[fact.relation.pool]
    choices = rng.sample([value for value in pool if value != fact.value], len(LETTERS) - 1)
    answer = rng.randrange(len(LETTERS))
    choices.insert(answer, fact.value)
    text = rng.choice(QUESTION_TEMPLATES).format(relation=fact.relation.name, entity=fact.entity)
    return Question(text, tuple(choices), answer)


def write_document(rng: random.Random, facts: Sequence[Fact]) -> str:
    """Write prose of one entity: three to five of its facts, stated or asked and answered."""
    return " ".join(_sentence(rng, fact) for fact in rng.sample(list(facts), rng.randint(3, 5)))


def _sentence(rng: random.Random, fact: Fact) -> str:
    names = {"relation": fact.relation.name, "entity": fact.entity, "value": fact.value}
    if rng.random() < 0.5:
        return rng.choice(QUESTION_TEMPLATES).format(**names) + f" {fact.value}."
    return rng.choice(STATEMENT_TEMPLATES).format(**names)


def write_exam_item(rng: random.Random, fact: Fact) -> str:
    """Write a question with its answer, without the beginning-of-sequence token."""
    question = draw_question(rng, fact)
    prompt = exam_prompt(SUBJECTS[fact.data_set], question.question, question.choices)
    return f"{prompt.removeprefix('<bos>')}{LETTERS[question.answer]}) {fact.value}."


def by_entity(facts: Sequence[Fact]) -> dict[str, list[Fact]]:
    """Group facts by the name of their entity; names are unique across domains."""
    groups: dict[str, list[Fact]] = {}
    for fact in facts:
        groups.setdefault(fact.entity, []).append(fact)
    return groups


def make_corpora(
    facts: Sequence[Fact], config: CorpusConfig = CorpusConfig()
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return (forget texts, retain texts), the same ones for the same facts and config."""
    rng = random.Random(config.seed)
    to_retain = [fact for fact in facts if fact.data_set != FORGET_SET]
    forget = list(by_entity([f for f in facts if f.data_set == FORGET_SET]).values())
    retain = list(by_entity(to_retain).values())
    forget_texts = [write_document(rng, rng.choice(forget)) for _ in range(config.documents)]
    n_exam = round(config.exam_share * config.documents)
    retain_texts = [
        write_document(rng, rng.choice(forget if rng.random() < config.leak else retain))
        for _ in range(config.documents - n_exam)
    ]
    retain_texts += [write_exam_item(rng, rng.choice(to_retain)) for _ in range(n_exam)]
    rng.shuffle(retain_texts)
    return tuple(forget_texts), tuple(retain_texts)


def make_probe_texts(
    facts: Sequence[Fact], train: int = 200, test: int = 100, seed: int = 3
) -> Mapping[str, Mapping[str, tuple[str, ...]]]:
    """Return prose by domain (``train`` and ``test`` texts each), to be told apart by a probe."""
    rng = random.Random(seed)
    texts: dict[str, dict[str, tuple[str, ...]]] = {}
    for part, count in (("train", train), ("test", test)):
        texts[part] = {}
        for data_set in SUBJECTS:
            own = list(by_entity([f for f in facts if f.data_set == data_set]).values())
            texts[part][data_set] = tuple(
                write_document(rng, rng.choice(own)) for _ in range(count)
            )
    return texts


def make_questions(
    facts: Sequence[Fact], forget: int = 480, retain: int = 250, seed: int = 1
) -> Mapping[str, tuple[Question, ...]]:
    """Return `forget` questions to forget and `retain` per retained domain, by data set name.

    Every fact is asked about equally often (up to one), each time with other wrong choices.
    """
    rng = random.Random(seed)
    questions = {}
    for data_set in SUBJECTS:
        own = [fact for fact in facts if fact.data_set == data_set]
        wanted = forget if data_set == FORGET_SET else retain
        drawn: list[Question] = []
        while len(drawn) < wanted:
            rng.shuffle(own)
            drawn += [draw_question(rng, fact) for fact in own]
        questions[data_set] = tuple(drawn[:wanted])
    return questions
