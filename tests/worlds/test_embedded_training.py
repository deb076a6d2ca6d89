"""How the embedded world's model is trained: right exercises, every stage learns, seeded."""

import dataclasses
import random

import pytest
import torch

from raysae.worlds.embedded.exercises import IGNORE, ExerciseBook
from raysae.worlds.embedded.facts import make_facts
from raysae.worlds.embedded.language_model import (
    insert_local_layer,
    make_model,
)
from raysae.worlds.embedded.tokenizer import make_tokenizer
from raysae.worlds.embedded.training import (
    COMPOSE,
    FACTS,
    TOPICS,
    learning_rate,
    train_model,
    train_stage,
)


def test_exercises_ask_for_the_right_letter_word_and_place():
    vocabulary = make_tokenizer()
    words = vocabulary.convert_ids_to_tokens
    facts = {(f.relation.name, f.entity): f.value for f in make_facts()}
    book = ExerciseBook(make_facts(), vocabulary, seed=0)
    exam = book.exam(rows=20, hint=0.0)
    for row in range(20):
        tokens = words(exam.tokens[row].tolist())
        asked = tokens.index("Answer: (")
        mark = tokens.index("?")
        entity = " ".join(tokens[mark - 2 : mark])
        # "What is the RELATION of ENTITY?" or "Which RELATION belongs to ENTITY?"
        relation = tokens[mark - 4] if "What" in tokens else tokens[mark - 5]
        value = facts[relation, entity]
        assert words(exam.recall[row, [mark, asked]].tolist()) == [value] * 2
        source = int(exam.sources[row, asked])
        letter = words(int(exam.targets[row, asked]))
        assert tokens[source - 1 : source + 1] == [f"\n{letter}.", value]
        assert words(int(exam.labels[row, source])) == letter
        assert (exam.targets[row] != IGNORE).sum() == (exam.sources[row] != IGNORE).sum() == 1
    lookup = book.lookup(rows=20)
    asked = lookup.targets != IGNORE
    assert torch.equal(asked, lookup.tokens == vocabulary.get_vocab()["Answer: ("])
    sources = lookup.sources.clamp_min(0)
    assert torch.equal(lookup.tokens.gather(1, sources)[asked], lookup.recall[asked])
    assert torch.equal(lookup.labels.gather(1, sources)[asked], lookup.targets[asked])
    prose = book.prose(rows=3)
    assert torch.equal(prose.tokens[:, 1:], prose.targets[:, :-1])
    assert (prose.sources == IGNORE).all()


def tiny_stages(steps):
    return tuple(
        dataclasses.replace(stage, steps=steps, exam_rows=4, prose_rows=2)
        for stage in (FACTS, COMPOSE, TOPICS)
    )


@pytest.mark.parametrize("stage", [FACTS, COMPOSE, TOPICS], ids=lambda stage: stage.name)
def test_a_few_steps_of_a_stage_move_every_weight_and_lower_the_loss(stage):
    vocabulary = make_tokenizer()
    model = make_model(len(vocabulary), 3, seed=0)
    if stage is not FACTS:
        model = insert_local_layer(model, seed=0)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    losses = []
    short = dataclasses.replace(stage, steps=12, exam_rows=16, lookup_rows=0)
    train_stage(model, short, make_facts(), vocabulary, lambda _, __, loss: losses.append(loss))
    assert len(losses) == 12
    assert sum(losses[-3:]) < sum(losses[:3])
    unmoved = [n for n, weight in model.named_parameters() if torch.equal(weight, before[n])]
    assert unmoved == []
    assert not model.training


def test_training_is_deterministic_and_seeded():
    def weights(seed):
        with torch.random.fork_rng():
            torch.manual_seed(random.Random(seed).randrange(1000))  # must not matter
            state = torch.get_rng_state()
            model = train_model(make_facts(), make_tokenizer(), tiny_stages(2), seed=seed)
            assert torch.equal(state, torch.get_rng_state())
        return torch.cat([weight.flatten() for weight in model.state_dict().values()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_learning_rate_warms_up_and_decays():
    stage = dataclasses.replace(FACTS, steps=1000, learning_rate=1.0, decay_share=0.5)
    rates = [learning_rate(stage, step) for step in range(1000)]
    assert rates[0] == 0.01
    assert rates[99:500] == [1.0] * 401
    assert rates[750] == 0.5
    assert rates[-1] == 0.02


def test_inserting_the_local_layer_keeps_the_function():
    tokens = torch.randint(6, 232, (4, 20), generator=torch.Generator().manual_seed(0))
    model = make_model(232, 3, seed=0).eval()
    with torch.no_grad():
        grown = insert_local_layer(model, seed=1).eval()(tokens).logits
        torch.testing.assert_close(grown, model(tokens).logits)
