"""What a task of the harvest leaves behind in its process, which Ray lets live on: no model."""

import gc
import time
from collections.abc import Callable, Iterator
from weakref import ReferenceType, ref

import pytest
import torch
from transformer_lens import HookedTransformer

from raysae.store import tasks
from raysae.store.activations import corpus_tokens
from raysae.store.chunks import Piece
from raysae.worlds import load_world
from raysae.worlds import model as worlds_model
from raysae.worlds.model import load_model

HOOK = "blocks.0.hook_resid_post"


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[bool]]]:
    """Says of every model that was loaded whether it still is."""
    made: list[ReferenceType[HookedTransformer]] = []

    def load(*args, **kwargs) -> HookedTransformer:
        model = load_model(*args, **kwargs)
        made.append(ref(model))
        return model

    def look() -> list[bool]:
        gc.collect()
        return [model() is not None for model in made]

    threads = torch.get_num_threads()
    monkeypatch.setattr(worlds_model, "load_model", load)
    yield look
    tasks._LATER.put_off(None)
    tasks._let_go_of_model()
    torch.set_num_threads(threads)


def test_texts_are_tokenised_without_a_model(alive):
    lengths, *tokens = tasks.tokenize._function("embedded")
    assert alive() == []
    world = load_world("embedded")
    wanted = corpus_tokens(world, load_model(world).tokenizer)
    assert lengths == {name: len(part) for name, part in wanted.items()}
    for ours, theirs in zip(tokens, wanted.values(), strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours == theirs).all()


def test_the_model_that_was_asked_goes_with_the_questions(alive, monkeypatch):
    world = load_world("embedded")
    few = {name: questions[:2] for name, questions in world.questions.items()}
    small = tasks.replace(world, questions=few)
    monkeypatch.setattr(tasks, "load_world", lambda *_, **__: small)
    found = tasks.known_questions._function("embedded", "cpu")
    assert set(found["ids"]) == set(few)
    assert alive() == [False]


def test_the_model_goes_when_what_is_scored_cannot_be_made(alive):
    with pytest.raises(Exception, match="blocks"):
        tasks.evaluation_cache._function("embedded", "blocks.77.none", None, "cpu", None, 0)
    assert alive() == [False]


def test_a_harvest_keeps_its_model_for_the_next_piece_and_no_longer(alive, monkeypatch):
    world = load_world("embedded")
    tokens = corpus_tokens(world, load_model(world).tokenizer)["forget"][:8]

    def harvest(*, last: bool) -> None:
        piece = Piece("forget", 0, 4)
        tasks.harvest_piece._function("embedded", [HOOK], piece, "float32", "cpu", tokens, last)

    harvest(last=False)
    harvest(last=False)
    assert alive() == [True]
    harvest(last=True)
    assert alive() == [False]
    # One that was computed again, and is followed by none.
    monkeypatch.setattr(tasks, "KEPT_SECONDS", 0.2)
    harvest(last=False)
    deadline = time.monotonic() + 20
    while any(alive()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert alive() == [False, False]
