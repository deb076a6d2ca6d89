"""Questions and corpora that SAEBench cannot use are refused when the world is made."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from raysae.worlds import load_world
from raysae.worlds.world import FORGET_SET, World


@pytest.fixture(scope="module")
def world() -> World:
    return load_world("embedded")


def with_first_question(world: World, **changes: Any) -> dict[str, Any]:
    first, *others = world.questions["human_aging"]
    changed = (dataclasses.replace(first, **changes), *others)
    return {"questions": dict(world.questions) | {"human_aging": changed}}


@pytest.mark.parametrize("answer", [-1, 4])
def test_an_answer_outside_the_choices(world: World, answer: int):
    with pytest.raises(
        ValueError, match=rf"human_aging, question 0 has the answer {answer}; .* 0 to 3"
    ):
        dataclasses.replace(world, **with_first_question(world, answer=answer))


def test_three_choices(world: World):
    with pytest.raises(ValueError, match="human_aging, question 0 has 3 choices, not 4"):
        dataclasses.replace(world, **with_first_question(world, choices=("a", "b", "c")))


def test_a_data_set_without_questions(world: World):
    empty = dict(world.questions) | {"human_aging": ()}
    with pytest.raises(ValueError, match="no questions for human_aging"):
        dataclasses.replace(world, questions=empty)
    retained = {name: qs for name, qs in world.questions.items() if name != FORGET_SET}
    with pytest.raises(ValueError, match=f"no questions for {FORGET_SET}"):
        dataclasses.replace(world, questions=retained)
    with pytest.raises(ValueError, match="no questions to retain"):
        dataclasses.replace(world, questions={FORGET_SET: world.questions[FORGET_SET]})


@pytest.mark.parametrize("corpus", ["forget", "retain"])
@pytest.mark.parametrize("texts", [(), ("short",) * 9])
def test_a_corpus_of_which_nothing_is_used(world: World, corpus: str, texts: tuple[str, ...]):
    with pytest.raises(ValueError, match=rf"{corpus} corpus: {len(texts)} texts, none of more"):
        dataclasses.replace(world, **{f"{corpus}_texts": texts})
