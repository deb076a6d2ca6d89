"""A world of the hub, from a small checkpoint and data sets in the hub's own formats, offline."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import datasets
import huggingface_hub.constants
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value

from raysae.store.activations import corpus_tokens
from raysae.worlds import World, hub, load_world
from raysae.worlds.embedded import DATA
from raysae.worlds.model import load_model
from raysae.worlds.world import FORGET_SET, RETAIN_SETS, Question

LONG = "spore of gu po is oval and its home is desert, as ja ru has salmon for a mascot."
REVISION = "0123456789abcdef0123456789abcdef01234567"
MMLU = Features(
    {
        "question": Value("string"),
        "subject": Value("string"),
        "choices": Sequence(Value("string")),
        "answer": ClassLabel(names=["A", "B", "C", "D"]),
    }
)
WMDP = Features(
    {
        "answer": Value("int64"),
        "question": Value("string"),
        "choices": Sequence(Value("string")),
    }
)


def write_checkpoint(cache: Path, repository: str) -> None:
    """As `snapshot_download` leaves it in the hub's cache."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    for path in DATA.iterdir():
        (snapshot / path.name).write_bytes(path.read_bytes())
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(REVISION)


def write_data_set(folder: Path, splits: dict[tuple[str, str], Dataset]) -> None:
    """As a repository on the hub: Parquet files by (configuration, split), and a card for them."""
    lines = ["---", "configs:"]
    for (config, split), rows in splits.items():
        path = folder / config / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows.to_parquet(path)
        lines += [f"- config_name: {config}", "  data_files:", f"  - split: {split}"]
        lines += [f"    path: {config}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def asked(subject: str, n: int) -> list[Question]:
    return [
        Question(f"{subject} {i}?", tuple(f"{subject} {i}{letter}" for letter in "abcd"), i % 4)
        for i in range(n)
    ]


def rows(questions: list[Question], subject: str | None = None) -> dict[str, list[object]]:
    columns: dict[str, list[object]] = {
        "question": [q.question for q in questions],
        "choices": [list(q.choices) for q in questions],
        "answer": [q.answer for q in questions],
    }
    return columns if subject is None else columns | {"subject": [subject] * len(questions)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The gemma world, as it is loaded where everything has been cached and nothing answers."""
    root = tmp_path_factory.mktemp("hub")
    write_checkpoint(root / "cache", hub.MODELS["gemma-2-2b"].repository)
    texts = [f"{i}: {LONG}" for i in range(6)]
    forget = Dataset.from_dict({"title": ["t"] * 7, "text": [*texts, "too short"]})
    write_data_set(root / hub.FORGET_CORPUS, {("default", "train"): forget})
    name, config, split = hub.RETAIN_CORPUS
    pages = Dataset.from_dict({"text": ["", " = Heading = \n", *(t.upper() for t in texts)]})
    write_data_set(root / name, {(config, split): pages})
    bio = Dataset.from_dict(rows(asked(FORGET_SET, 5)), features=WMDP)
    write_data_set(root / "cais/wmdp", {(FORGET_SET, "test"): bio})
    subjects = {
        (subject, "test"): Dataset.from_dict(rows(asked(subject, 3), subject), features=MMLU)
        for subject in RETAIN_SETS
    }
    write_data_set(root / "cais/mmlu", subjects)
    with pytest.MonkeyPatch.context() as patch:
        # `load_dataset` prefers a folder of the repository's name to the repository.
        patch.chdir(root)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root / "cache"))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "data")
        yield load_world("gemma-2-2b")


def test_the_model_is_the_cached_snapshot_and_can_be_run(world: World):
    assert world.model_path.name == REVISION
    assert world.saebench_model_name == "gemma-2-2b-it"
    model = load_model(world)
    tokens = corpus_tokens(dataclasses.replace(world, seq_len=32), model)["forget"]
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens))
    assert len(tokens) > 1
    assert logits.shape == (*tokens.shape, model.cfg.d_vocab)
    assert bool(torch.isfinite(logits).all())


def test_the_corpora_leave_out_what_saebench_leaves_out(world: World):
    assert world.forget_texts == tuple(f"{i}: {LONG}" for i in range(6))
    assert world.retain_texts == tuple(f"{i}: {LONG}".upper() for i in range(6))


@pytest.mark.parametrize("subject", [FORGET_SET, *RETAIN_SETS])
def test_the_questions_keep_their_order_their_choices_and_their_answers(world: World, subject: str):
    n = 5 if subject == FORGET_SET else 3
    assert list(world.questions[subject]) == asked(subject, n)


def test_what_the_model_knows_is_found_out_when_it_is_needed(world: World):
    assert world.known_questions is None
    assert set(world.questions) == {FORGET_SET, *RETAIN_SETS}


def test_the_hook_is_the_studys_and_the_contents_have_a_fingerprint(world: World):
    assert world.default_hook_name == "blocks.19.hook_resid_post"
    assert len(world.fingerprint()) == 64


@pytest.mark.usefixtures("world")
def test_a_data_set_that_is_not_there_is_named_with_what_it_takes(tmp_path: Path):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        with pytest.raises(ConnectionError, match=r"wmdp-bio-forget-corpus.*HF_TOKEN"):
            load_world("gemma-2-2b")
