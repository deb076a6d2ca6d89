"""Texts and questions from files as people have them, and from folders of the hub's data sets.

A mistake in a file is named with its field, file and row, and with what was expected.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysae.errors import UserError, first_line
from raysae.worlds.prompts import LETTERS
from raysae.worlds.spec import Corpus, Questions, Source
from raysae.worlds.texts import TextsOnDisk
from raysae.worlds.world import Question

MIN_CHARACTERS = 50
"""SAEBench drops texts that are not longer."""
ENCODING = "utf-8-sig"
"""UTF-8, after a byte-order mark or without: Excel and Windows' editors write one."""
LONGEST_FIELD = 2**31 - 1
"""Characters of a CSV file's field: a full paper has more than the 131 072 that Python allows."""


@dataclass(frozen=True, eq=False)
class CorpusTexts(TextsOnDisk):
    """The texts of a corpus that are longer than `MIN_CHARACTERS`.

    To go through them raises UserError for what cannot be read, lacks the column, or holds no text.
    """

    source: Corpus
    """As the user described it."""
    place: Path
    """Its file or folder."""
    field: str
    """Names it in messages."""

    def __iter__(self) -> Iterator[str]:
        kept = number = 0
        for number, row in enumerate(_rows(self.source, self.place, self.field), 1):
            text = row.get(self.source.column)
            if not isinstance(text, str):
                raise UserError(
                    f"{self.field}: {self.place}, row {number}: no text in column "
                    f"{self.source.column!r}; it has {', '.join(map(repr, row)) or 'nothing'} "
                    f"(set {self.field}.column)"
                )
            if len(text) > MIN_CHARACTERS:
                yield text
                kept += 1
                if kept == self.source.max_texts:
                    return
        if not kept:
            why = "empty"
            if number:
                why = f"none of {number} is longer than {MIN_CHARACTERS} characters"
            raise UserError(f"{self.field}: {self.place}: no texts: {why}")


def read_texts(source: Corpus, place: Path, field: str) -> CorpusTexts:
    """The texts of a corpus, after having gone through all of them once.

    Raises UserError as `CorpusTexts`.
    """
    texts = CorpusTexts(source, place, field)
    _ = texts.summary
    return texts


def read_questions(source: Questions, place: Path, field: str) -> tuple[Question, ...]:
    """Return all questions, in their order.

    A row has `question`, `choices` (four; in CSV as JSON, or in columns A, B, C, D) and `answer`
    (0 to 3, or A to D).

    Raises UserError for a row that is not such a question, and for none at all.
    """
    questions = tuple(
        _question(row, f"{field}: {place}, row {number}")
        for number, row in enumerate(_rows(source, place, field), 1)
    )
    if not questions:
        raise UserError(f"{field}: {place}: no questions: empty")
    return questions


def _question(row: dict[str, Any], where: str) -> Question:
    for name in ("question", "answer"):
        if row.get(name) is None:
            raise UserError(
                f"{where}: no {name!r}; expected question, choices and answer, found "
                f"{', '.join(map(repr, row)) or 'nothing'}"
            )
    text = row["question"]
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: question {text!r} is not a text")
    choices = _choices(row, where)
    return Question(text, choices, _answer(row["answer"], where))


def _choices(row: dict[str, Any], where: str) -> tuple[str, ...]:
    found = row.get("choices")
    if found is None and all(letter in row for letter in LETTERS):
        found = [row[letter] for letter in LETTERS]
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except ValueError:
            raise UserError(f"{where}: choices {found!r} is not a JSON list") from None
    if found is None:
        raise UserError(f"{where}: no 'choices' (or columns A, B, C, D)")
    choices = list(found) if not isinstance(found, str | dict) else []
    if len(choices) != len(LETTERS):
        raise UserError(f"{where}: {len(choices)} choices, expected {len(LETTERS)}: {found!r}")
    if None in choices:
        raise UserError(f"{where}: choice {LETTERS[choices.index(None)]} is missing: {found!r}")
    return tuple(str(choice) for choice in choices)


def _answer(value: Any, where: str) -> int:
    text = str(value).strip()
    if len(text) == 1 and text.upper() in LETTERS:
        return LETTERS.index(text.upper())
    try:
        answer = int(text)
    except ValueError:
        answer = -1
    if not 0 <= answer < len(LETTERS) or isinstance(value, bool):
        raise UserError(f"{where}: answer {value!r}, expected 0 to 3 or A to D")
    return answer


def _rows(source: Source, place: Path, field: str) -> Iterator[dict[str, Any]]:
    if place.is_dir():
        return _rows_of_folder(source, place, field)
    if not place.is_file():
        raise UserError(f"{field}: {place}: no such file or folder")
    readers = {
        ".txt": _rows_of_text,
        ".jsonl": _rows_of_json_lines,
        ".json": _rows_of_json,
        ".csv": _rows_of_csv,
        ".parquet": _rows_of_parquet,
    }
    if place.suffix not in source.formats:
        raise UserError(
            f"{field}: {place}: files of {place.suffix!r} are not read; valid: "
            f"{', '.join(source.formats)}, or a folder"
        )
    return _checked(readers[place.suffix](place), place, field)


def _checked(rows: Iterator[Any], place: Path, field: str) -> Iterator[dict[str, Any]]:
    number = 0
    while True:
        number += 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except (OSError, ValueError, csv.Error) as error:
            raise UserError(f"{field}: {place}, row {number}: cannot be read: {error}") from None
        if not isinstance(row, dict):
            raise UserError(
                f"{field}: {place}, row {number}: expected an object, found {type(row).__name__}"
            )
        yield row


def _rows_of_text(path: Path) -> Iterator[dict[str, Any]]:
    """Paragraphs: blank lines part texts."""
    lines: list[str] = []
    with path.open(encoding=ENCODING) as file:
        for line in file:
            if line.strip():
                lines.append(line)
            elif lines:
                yield {"text": "".join(lines).strip("\n")}
                lines = []
    if lines:
        yield {"text": "".join(lines).strip("\n")}


def _rows_of_json_lines(path: Path) -> Iterator[Any]:
    with path.open(encoding=ENCODING) as file:
        yield from (json.loads(line) for line in file if line.strip())


def _rows_of_json(path: Path) -> Iterator[Any]:
    """A list of objects, or one object a line."""
    text = path.read_text(encoding=ENCODING)
    if text.lstrip().startswith("["):
        yield from json.loads(text)
    else:
        yield from (json.loads(line) for line in text.splitlines() if line.strip())


def _rows_of_csv(path: Path) -> Iterator[Any]:
    with path.open(encoding=ENCODING, newline="") as file:
        reader = csv.DictReader(file)
        while True:
            before = csv.field_size_limit(LONGEST_FIELD)  # of the process: others get it back
            try:
                row = next(reader, None)
            finally:
                csv.field_size_limit(before)
            if row is None:
                return
            fields = len(reader.fieldnames or ())
            missing = sum(value is None for value in row.values())
            found = fields - missing + len(row.get(None, ()))
            if found != fields:
                raise ValueError(
                    f"line {reader.line_num} ends a row of {found} fields, the header has {fields} "
                    "(a text with a comma or a line break needs quotes)"
                )
            yield row


def _rows_of_parquet(path: Path) -> Iterator[Any]:
    import pyarrow.parquet as pq
    from pyarrow.lib import ArrowInvalid

    try:
        file = pq.ParquetFile(path)
    except ArrowInvalid as error:
        raise ValueError(str(error)) from None
    for batch in file.iter_batches():
        yield from batch.to_pylist()


def _rows_of_folder(source: Source, folder: Path, field: str) -> Iterator[dict[str, Any]]:
    """Rows of a data set's folder, read by `datasets`; nothing is fetched for one on this machine.

    Streamed: prepared data sets are cached by the folder's last name, and those of another folder
    of that name would be returned. A folder without a card has its configurations as folders.
    """
    from datasets import load_dataset

    arguments: dict[str, Any] = {}
    if source.config is not None:
        listed = (folder / "README.md").is_file()
        arguments = {"name": source.config} if listed else {"data_dir": source.config}
    try:
        yield from load_dataset(str(folder), split=source.split, streaming=True, **arguments)
    except Exception as error:  # parsers, file systems and builders raise dozens of types
        found = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        raise UserError(
            f"{field}: {folder}: no split {source.split!r}"
            + (f" of configuration {source.config!r}" if source.config else "")
            + f" can be read there ({type(error).__name__}: {first_line(error)}); it has "
            f"{', '.join(found[:6]) or 'nothing'}{' …' if len(found) > 6 else ''}"
        ) from None
