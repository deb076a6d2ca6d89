"""The embedded world: a small language model with invented knowledge, shipped with the package.

It needs no download, and a score on it moves for the reasons a score on a real model moves.
`python -m raysae.worlds.embedded.build` makes it anew; `facts` and `text` say what it knows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from raysae.worlds.embedded.facts import make_facts
from raysae.worlds.embedded.text import make_corpora, make_probe_texts, make_questions
from raysae.worlds.world import Question, World, sha256_of_file, sha256_of_questions

DATA = Path(__file__).parent / "data"
HOOK_LAYER = 0
"""The residual stream after the layer that composes names, before those that recall facts."""
KNOWN_QUESTIONS_FILE = "known_questions.json"
REBUILD = "run `python -m raysae.worlds.embedded.build` to make the model and its ids anew"


def load(folder: Path = DATA) -> World:
    """Return the embedded world with the model in `folder`; needs neither torch nor a network.

    Raises ValueError if the known questions of the folder belong to other weights or to other
    questions than the ones here.
    """
    world = without_known_questions(folder)
    known = read_known_questions(folder, world.questions)["correct"]
    return World(**(vars(world) | {"known_questions": known}))


def without_known_questions(folder: Path) -> World:
    """Return the world before it is known what its model knows."""
    facts = make_facts()
    forget_texts, retain_texts = make_corpora(facts)
    return World(
        name="embedded",
        model_path=folder,
        saebench_model_name="gemma-2-2b-it",
        default_hook_name=f"blocks.{HOOK_LAYER}.hook_resid_post",
        seq_len=64,
        forget_texts=forget_texts,
        retain_texts=retain_texts,
        questions=MappingProxyType(make_questions(facts)),
        known_questions=None,
        probe_texts=make_probe_texts(facts),
    )


def read_known_questions(
    folder: Path, questions: Mapping[str, tuple[Question, ...]]
) -> dict[str, Mapping[str, tuple[int, ...]]]:
    """Return the ids by SAEBench's kind (``correct``, ...) and data set.

    Raises ValueError if they were found with other weights or for other questions.
    """
    path = folder / KNOWN_QUESTIONS_FILE
    stored = json.loads(path.read_text())
    if stored["weights_sha256"] != sha256_of_file(folder / "model.safetensors"):
        raise ValueError(f"{path} belongs to other weights than {folder} holds: {REBUILD}")
    if stored["questions_sha256"] != sha256_of_questions(questions):
        raise ValueError(f"{path} belongs to other questions than this code asks: {REBUILD}")
    return {
        kind: MappingProxyType({name: tuple(ids) for name, ids in by_set.items()})
        for kind, by_set in stored["ids"].items()
    }
