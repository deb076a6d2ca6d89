"""Worlds of plain files: every format, every mistake, and the example of the documentation."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from small_hub import json_lines, questions_as_json_lines, small_world, write_gemma

from raysae.config import RunConfig, find_space, load_config, world_of
from raysae.errors import UserError
from raysae.worlds import World, load_world
from raysae.worlds import rows as module
from raysae.worlds.presets import PRESETS
from raysae.worlds.rows import MIN_CHARACTERS, CorpusTexts, read_questions, read_texts
from raysae.worlds.spec import Corpus, HubWorld, LocalWorld, Questions, Source, Typed
from raysae.worlds.texts import sha256_of_texts
from raysae.worlds.world import FORGET_SET

DOCS = Path(__file__).parents[2] / "docs"
TEXTS = [f"text {i}: " + "many words follow one another here, " * 3 for i in range(3)]
ASKED = [
    {"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 2},
    {"question": "Who?", "choices": ["e", "f", "g", "h"], "answer": 0},
]


@pytest.fixture(scope="module")
def small() -> World:
    return small_world(n_forget=4, n_retain=3, n_texts=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small: World) -> Path:
    """What the documentation's example names, filled with the embedded world's contents."""
    folder = tmp_path_factory.mktemp("mine")
    write_gemma(folder / "my-model")
    json_lines(folder / "alchemy.jsonl", [{"text": text} for text in small.forget_texts])
    (folder / "everything-else.txt").write_text("\n\n".join(small.retain_texts))
    with (folder / "alchemy-questions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "A", "B", "C", "D", "answer"])
        for q in small.questions[FORGET_SET]:
            writer.writerow([q.question, *q.choices, "ABCD"[q.answer]])
    questions_as_json_lines(folder / "history.jsonl", small.questions["human_aging"])
    plain = [
        {"question": q.question, "choices": list(q.choices), "answer": q.answer}
        for q in small.questions["high_school_geography"]
    ]
    pd.DataFrame(plain).to_parquet(folder / "geography.parquet")
    return folder


def example() -> str:
    """The YAML block of docs/own_domain.md."""
    text = (DOCS / "own_domain.md").read_text(encoding="utf-8")
    return text.split("```yaml\n")[1].split("```")[0]


def test_the_documented_example_is_ten_lines_and_a_world(folder: Path, small: World):
    assert len(example().strip().splitlines()) == 10
    (folder / "alchemy.yaml").write_text(example())
    spec = world_of(str(folder / "alchemy.yaml"))
    assert isinstance(spec, LocalWorld)
    world = load_world(spec)
    assert tuple(world.forget_texts) == small.forget_texts
    assert tuple(world.retain_texts) == small.retain_texts
    assert world.questions == {
        FORGET_SET: small.questions[FORGET_SET],
        "world_history": small.questions["human_aging"],
        "geography": small.questions["high_school_geography"],
    }
    assert "(with answers) about alchemy.\n" in world.ask(FORGET_SET, 0)
    assert "(with answers) about world history.\n" in world.ask("world_history", 0)


def test_a_process_that_needs_the_model_only_opens_no_corpus(folder: Path, monkeypatch):
    (folder / "alchemy.yaml").write_text(example())
    spec = world_of(str(folder / "alchemy.yaml"))
    opened: list[str] = []
    rows = module._rows

    def noted(source: Source, place: Path, field: str) -> Iterator[dict[str, Any]]:
        opened.append(field)
        return rows(source, place, field)

    monkeypatch.setattr(module, "_rows", noted)
    world = load_world(spec, checked=True)
    assert opened and all("questions" in field for field in opened)
    assert world.prompt == load_world(spec).prompt
    opened.clear()
    next(iter(world.forget_texts))
    assert opened == ["world.forget.corpus"]


def test_the_example_in_a_space_file_says_the_same(folder: Path):
    space = {
        "world": yaml.safe_load(example()),
        "sae": {"k": 4},
        "space": {"regularizer": {"none": None}},
    }
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump(space, sort_keys=False))
    (folder / "alchemy.yaml").write_text(example())
    config = load_config(path)
    assert config.world == world_of(str(folder / "alchemy.yaml"))
    # A run's own config.yaml has the whole of it, wherever it lies.
    dumped = config.model_dump(mode="json", by_alias=True)
    again = RunConfig.model_validate(dumped, context={"folder": "/elsewhere"})
    assert again.world == config.world
    assert hash(again.world) == hash(config.world)


# --- Formats -------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv", ".parquet"])
def test_texts_in_every_format(tmp_path: Path, suffix: str):
    path = tmp_path / f"texts{suffix}"
    frame = pd.DataFrame({"text": [*TEXTS, "too short"], "other": 1})
    if suffix == ".txt":
        path.write_text("\n\n".join([*TEXTS, "too short"]) + "\n\n\n")
    elif suffix == ".csv":
        frame.to_csv(path)
    elif suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_json(path, orient="records", lines=suffix == ".jsonl")
    texts = read_texts(Corpus(path=str(path)), path, "f")
    assert list(texts) == list(texts) == TEXTS  # as often as one likes
    assert len(texts) == len(TEXTS)
    assert sha256_of_texts(texts) == sha256_of_texts(TEXTS)
    assert list(read_texts(Corpus(path=str(path), max_texts=2), path, "f")) == TEXTS[:2]


def test_texts_are_read_as_they_are_gone_through_and_not_held(tmp_path: Path):
    path = json_lines(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    texts = read_texts(Corpus(path=str(path)), path, "f")
    one = iter(texts)
    assert next(one) == TEXTS[0]
    json_lines(path, [{"text": text.upper()} for text in TEXTS])
    assert list(texts) == [text.upper() for text in TEXTS]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_questions_in_every_format(tmp_path: Path, suffix: str):
    path = tmp_path / f"questions{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(ASKED))
    elif suffix == ".jsonl":
        json_lines(path, ASKED)
    elif suffix == ".parquet":
        pd.DataFrame(ASKED).to_parquet(path)
    else:
        rows = [dict(row, choices=json.dumps(row["choices"])) for row in ASKED]
        pd.DataFrame(rows).to_csv(path)
    found = read_questions(Questions(path=str(path)), path, "f")
    assert [(q.question, list(q.choices), q.answer) for q in found] == [
        (row["question"], row["choices"], row["answer"]) for row in ASKED
    ]


@pytest.mark.parametrize(("answer", "expected"), [("C", 2), ("c", 2), ("2", 2), (2, 2)])
def test_answers_are_letters_or_numbers(tmp_path: Path, answer: Any, expected: int):
    path = json_lines(tmp_path / "q.jsonl", [{**ASKED[0], "answer": answer}])
    assert read_questions(Questions(path=str(path)), path, "f")[0].answer == expected


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv"])
def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path: Path, suffix: str):
    """Excel writes one with «CSV UTF-8»."""
    path = tmp_path / f"texts{suffix}"
    written = {".txt": TEXTS[0], ".csv": f'text\n"{TEXTS[0]}"\n'}
    path.write_text(written.get(suffix, json.dumps({"text": TEXTS[0]})), encoding="utf-8-sig")
    assert list(read_texts(Corpus(path=str(path)), path, "f")) == [TEXTS[0]]


def test_a_csv_file_holds_full_papers(tmp_path: Path):
    paper = "word " * 40_000
    path = tmp_path / "papers.csv"
    pd.DataFrame({"text": [paper, TEXTS[0]]}).to_csv(path, index=False)
    limit = csv.field_size_limit()
    assert len(paper) > limit
    assert list(read_texts(Corpus(path=str(path)), path, "f")) == [paper, TEXTS[0]]
    texts = iter(CorpusTexts(Corpus(path=str(path)), path, "f"))
    next(texts)
    assert csv.field_size_limit() == limit  # of the whole process, and not for others to notice


# --- Mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": ["a", "b", "c"]}, r"row 2: 3 choices, expected 4: \['a', 'b', 'c'\]"),
        ({"choices": ["a", None, "c", "d"]}, r"row 2: choice B is missing: \['a', None, 'c', 'd'"),
        ({"choices": None}, r"row 2: no 'choices' \(or columns A, B, C, D\)"),
        ({"choices": "a, b"}, "row 2: choices 'a, b' is not a JSON list"),
        ({"answer": 4}, "row 2: answer 4, expected 0 to 3 or A to D"),
        ({"answer": -1}, "row 2: answer -1"),
        ({"answer": "E"}, "row 2: answer 'E'"),
        ({"answer": True}, "row 2: answer True"),
        ({"answer": None}, r"row 2: no 'answer'; expected question, choices and answer, found 'qu"),
        ({"question": " "}, "row 2: question ' ' is not a text"),
        ({"question": None}, "row 2: no 'question'"),
    ],
)
def test_a_row_that_is_no_question(tmp_path: Path, change: dict[str, Any], message: str):
    path = json_lines(tmp_path / "q.jsonl", [ASKED[0], {**ASKED[1], **change}])
    with pytest.raises(UserError, match=rf"world.forget.questions: .*q.jsonl, {message}"):
        read_questions(Questions(path=str(path)), path, "world.forget.questions")


@pytest.mark.parametrize(
    ("row", "fields"), [("Who?,B,e,f,g", 5), ("Who, and why?,B,e,f,g,h", 7)], ids=["short", "long"]
)
def test_a_csv_row_of_another_length_is_refused_with_its_line(
    tmp_path: Path, row: str, fields: int
):
    """Python's reader would make None of what is missing, and answers of what has moved over."""
    path = tmp_path / "q.csv"
    path.write_text(f'question,answer,A,B,C,D\n"Which\none?",A,a,b,c,d\n{row}\n')
    message = rf"f: .*q.csv, row 2: cannot be read: line 4 ends a row of {fields} fields, .* has 6"
    with pytest.raises(UserError, match=message):
        read_questions(Questions(path=str(path)), path, "f")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", "", "no texts: empty"),
        ("t.txt", "short\n\nshort", f"no texts: none of 2 is longer than {MIN_CHARACTERS}"),
        ("t.jsonl", '{"text": 1}\n', "row 1: no text in column 'text'; it has 'text'"),
        ("t.jsonl", '{"body": "b"}\n', r"no text in column 'text'; it has 'body' \(set f.column\)"),
        ("t.jsonl", "not json\n", "row 1: cannot be read"),
        ("t.jsonl", '["a"]\n', "row 1: expected an object, found list"),
        ("t.parquet", "PAR0", "row 1: cannot be read"),
    ],
)
def test_a_corpus_that_is_none(tmp_path: Path, name: str, content: str, message: str):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_texts(Corpus(path=str(tmp_path / name)), tmp_path / name, "f")


def test_files_that_are_missing_or_empty(tmp_path: Path):
    missing = tmp_path / "no.jsonl"
    with pytest.raises(UserError, match=r"f: .*no.jsonl: no such file or folder"):
        read_texts(Corpus(path=str(missing)), missing, "f")
    missing.touch()
    with pytest.raises(UserError, match=r"no.jsonl: no questions: empty"):
        read_questions(Questions(path=str(missing)), missing, "f")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"folder: no split 'train' can be read .*has nothing"):
        read_texts(Corpus(path=str(tmp_path / "folder")), tmp_path / "folder", "f")


BASE = """\
kind: local
model: my-model
forget: {corpus: f.txt, questions: q.csv}
retain:
  corpus: r.txt
  questions: {history: h.csv}
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("model: my-model\n", "", "world.yaml: world.model: is missing"),
        ("kind: local", "kind: locl", "world.yaml: world: needs 'kind: hub' or 'kind: local'"),
        ("corpus: r.txt", "corpsu: r.txt", "world.yaml:5: world.retain.corpsu: unknown key "
         "'corpsu'; valid: corpus, questions, training_corpus. Did you mean 'corpus'?"),
        ("r.txt", "r.pdf", "world.yaml:5: world.retain.corpus: "),
        ("history:", "History:", "'History' cannot name a set of questions"),
        ("history:", "college_biology:", "'college_biology' cannot name a set of questions"),
        ("corpus: r.txt", "corpus: {dataset: a/b}", "retain.corpus: dataset 'a/b' is on the hub"),
        ("corpus: r.txt", "corpus: {path: r.txt, dataset: a/b}", "needs either 'path'"),
        ("model: my-model", "model: my-model\npermutations: 3", "world.permutations: Input should "
         "be 24, 4 or 1, got 3"),
        ("model: my-model", "model: [", "not valid YAML"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_worlds_file_is_named(tmp_path: Path, old: str, new: str, message: str):
    path = tmp_path / "world.yaml"
    path.write_text(BASE.replace(old, new))
    with pytest.raises(UserError) as caught:
        world_of(str(path))
    assert message in str(caught.value)


def test_a_mistake_in_a_space_files_world_is_named_with_its_line(tmp_path: Path):
    path = tmp_path / "space.yaml"
    head = "space: {regularizer: {none: }, sae: {k: 4}}\n"
    path.write_text(f"{head}world:\n  kind: hub\n  modle: a/b\n")
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert f"{path}:2: world.model: is missing" in str(caught.value)
    assert f"{path}:4: world.modle: unknown key 'modle'" in str(caught.value)
    path.write_text(f"{head}world: {{kind: hub, model: nowhere}}\n")
    with pytest.raises(UserError, match=r"world.model: 'nowhere' is neither a folder \(.*nowh"):
        load_config(path)
    config = load_config(path, {"world.model": "a/b", "world.permutations": 4})
    assert config.world == HubWorld(model="a/b", permutations=4)


@pytest.mark.parametrize("space", ["seed_gemma-2-2b.yaml", "gemma-2-2b.yaml", "pythia-70m.yaml"])
def test_any_field_of_a_spaces_world_can_be_set(
    space: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Whether it goes by a name, is described, or leaves a domain to SAEBench."""
    monkeypatch.chdir(tmp_path)
    written = load_config(find_space(space)).world
    whole = PRESETS[written] if isinstance(written, str) else written
    world = load_config(
        find_space(space),
        {
            "world.folder": "hub",
            "world.forget.corpus": "bio.jsonl",
            "world.forget.corpus.column": "abstract",
            "world.retain.questions.human_aging.revision": "abc",
            "world.prompt": "plain",
        },
    ).world
    assert isinstance(whole, HubWorld) and isinstance(world, HubWorld)
    # Of the command line, hence from where the user is, and not beside the space file.
    assert world.folder == str(tmp_path / "hub")
    assert world.forget.corpus == Corpus(path=str(tmp_path / "bio.jsonl"), column="abstract")
    aging = whole.retain.questions["human_aging"]
    assert world.retain.questions == whole.retain.questions | {
        "human_aging": aging.model_copy(update={"revision": "abc"})
    }
    assert world.prompt == "plain"
    same = ("model", "score_model", "hook", "dtype", "llm_batch_size", "permutations", "seq_len")
    assert [getattr(world, name) for name in same] == [getattr(whole, name) for name in same]
    assert all(type(value) is not Typed for value in vars(world).values())


def test_a_world_of_a_file_of_its_own_can_be_set_with_paths_of_both(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (folder / "alchemy.yaml").write_text(example())
    monkeypatch.chdir(tmp_path)
    described = world_of(str(folder / "alchemy.yaml"))
    changes = {"world": described, "world.forget.corpus": "mine.jsonl", "world.seq_len": 64}
    world = load_config(find_space("orth.yaml"), changes).world
    assert isinstance(world, LocalWorld)
    assert world.forget.corpus.path == str(tmp_path / "mine.jsonl")
    assert world.model == str(folder / "my-model")
    assert world.retain == described.retain  # type: ignore[union-attr]


def test_a_world_set_as_a_whole_has_paths_from_where_the_user_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "my-model").mkdir()
    monkeypatch.chdir(tmp_path)
    world = {"kind": "hub", "model": "my-model", "folder": "hub"}
    made = load_config(find_space("orth.yaml"), {"world": world}).world
    assert made == HubWorld(model=str(tmp_path / "my-model"), folder=str(tmp_path / "hub"))


def test_a_world_that_is_neither_a_file_nor_a_name():
    with pytest.raises(UserError, match=r"--world embeded: neither a YAML file .*mean 'embedded'"):
        world_of("embeded")
    assert world_of("embedded") == "embedded"
