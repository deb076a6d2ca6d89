"""What a world is: a language model's folder, two corpora and multiple-choice questions about them.

A world is everything the SAEBench unlearning score needs besides a sparse autoencoder. This module
imports neither torch nor transformers, so that an entry point can check names before they load.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The data set names are SAEBench's: one set to forget, four MMLU subjects to retain.
FORGET_SET = "wmdp-bio"
RETAIN_SETS = (
    "high_school_us_history",
    "college_computer_science",
    "high_school_geography",
    "human_aging",
)

MIN_CHARACTERS = 50
"""SAEBench drops texts of this length and shorter ones."""
N_CHOICES = 4

_HOOK = re.compile(r"blocks\.(\d+)\.hook_resid_post")


@dataclass(frozen=True)
class Question:
    """One multiple-choice question in the order of choices SAEBench scores."""

    question: str
    choices: tuple[str, ...]
    """Four choices."""
    answer: int
    """Index of the right choice, 0 to 3."""


@dataclass(frozen=True)
class World:
    """A model with knowledge to forget and knowledge to retain, and the means to measure both."""

    name: str
    model_path: Path
    """Hugging Face folder: config, weights, tokenizer."""
    saebench_model_name: str
    """Selects SAEBench's prompt format and answer tokens, for example ``gemma-2-2b-it``."""
    default_hook_name: str
    """TransformerLens name of the residual-stream hook the autoencoders are trained at."""
    seq_len: int
    """Tokens per sequence when the corpora are tokenised and concatenated."""
    forget_texts: tuple[str, ...]
    retain_texts: tuple[str, ...]
    questions: Mapping[str, tuple[Question, ...]]
    """By SAEBench data set name: ``FORGET_SET`` and the ``RETAIN_SETS``."""
    known_questions: Mapping[str, tuple[int, ...]] | None
    """Ids (positions in ``questions``) answered right under all 24 permutations of the choices,
    SAEBench's kind ``correct``; None where they must be computed."""
    probe_texts: Mapping[str, Mapping[str, tuple[str, ...]]] | None = None
    """``train`` and ``test``: texts by class, for sparse probing; None for SAEBench's own."""

    def __post_init__(self) -> None:
        """Raise ValueError, naming what is wrong, for questions and corpora that cannot score."""
        check_corpus(f"world {self.name!r}: forget corpus", self.forget_texts)
        check_corpus(f"world {self.name!r}: retain corpus", self.retain_texts)
        check_questions(f"world {self.name!r}", self.questions)

    def fingerprint(self) -> str:
        """Return the sha256 (hex) of config, weights, tokenizer, corpora and questions.

        Depends on contents only, never on where the world lies, so that results of different
        machines can be compared. Raises FileNotFoundError if the folder holds no weights.
        """
        digest = self._digest_of_model()
        digest.update(sha256_of_texts(self.forget_texts).encode())
        digest.update(sha256_of_texts(self.retain_texts).encode())
        digest.update(sha256_of_questions(self.questions).encode())
        digest.update(f"{self.saebench_model_name}\0{self.seq_len}".encode())
        return digest.hexdigest()

    def model_fingerprint(self) -> str:
        """Return the sha256 (hex) of config, weights and tokenizer alone; raises as above."""
        return self._digest_of_model().hexdigest()

    def _digest_of_model(self) -> hashlib._Hash:
        if not any(self.model_path.glob("*.safetensors")):
            raise FileNotFoundError(f"no *.safetensors weights in {self.model_path}")
        digest = hashlib.sha256()
        for path in _files_that_define_the_model(self.model_path):
            digest.update(f"{path.name}\0{sha256_of_file(path)}\0".encode())
        return digest


def check_corpus(what: str, texts: Sequence[str]) -> None:
    """Raise ValueError for a corpus of which SAEBench would use no text; `what` names it."""
    if not any(len(text) > MIN_CHARACTERS for text in texts):
        raise ValueError(
            f"{what}: {len(texts)} texts, none of more than {MIN_CHARACTERS} characters; SAEBench "
            "drops shorter ones, and at least one is needed"
        )


def check_questions(what: str, questions: Mapping[str, Sequence[Question]]) -> None:
    """Raise ValueError for missing data sets and for questions SAEBench cannot ask."""
    missing = [name for name in (FORGET_SET, *RETAIN_SETS) if not questions.get(name)]
    if missing:
        raise ValueError(
            f"{what}: no questions for {', '.join(missing)}; every data set needs some"
        )
    for name, of_set in questions.items():
        for number, question in enumerate(of_set):
            where = f"{what}: {name}, question {number}"
            if len(question.choices) != N_CHOICES:
                raise ValueError(f"{where} has {len(question.choices)} choices, not {N_CHOICES}")
            if question.answer not in range(N_CHOICES):
                raise ValueError(
                    f"{where} has the answer {question.answer!r}; the choices count from 0 to "
                    f"{N_CHOICES - 1}"
                )


@dataclass(frozen=True)
class WorldEntry:
    """What is known of a world before it is loaded, so that a plan needs no download."""

    load: Callable[[], World]
    n_layers: int
    d_model: int
    default_hook_name: str


def load_world(name: str) -> World:
    """Return the world called `name`; raises ValueError naming the valid ones for another.

    Raises ConnectionError for a world of the hub that cannot be fetched.
    """
    if name not in WORLDS:
        raise ValueError(unknown_name("world", name, WORLDS))
    return WORLDS[name].load()


def _embedded() -> World:
    from raysae.worlds import embedded  # here, because that package imports this module

    return embedded.load()


def _from_hub(name: str) -> Callable[[], World]:
    def load() -> World:
        from raysae.worlds import hub

        return hub.load(name)

    return load


WORLDS: dict[str, WorldEntry] = {
    "embedded": WorldEntry(_embedded, 4, 128, "blocks.0.hook_resid_post"),
    "gemma-2-2b": WorldEntry(_from_hub("gemma-2-2b"), 26, 2304, "blocks.19.hook_resid_post"),
}


def hook_layer(hook_name: str) -> int:
    """Return L of ``blocks.L.hook_resid_post``; raises ValueError for any other form."""
    match = _HOOK.fullmatch(hook_name)
    if match is None:
        raise ValueError(
            f"hook name {hook_name!r} is not of the form 'blocks.L.hook_resid_post' "
            "(L the layer, counted from 0)"
        )
    return int(match.group(1))


def valid_hooks(world: World) -> list[str]:
    """Return the hook names an autoencoder can be trained at, first layer first.

    Reads ``num_hidden_layers`` from the folder's config.json. The last layer is left out: no layer
    follows it, so that an intervention there could only rewrite the logits.
    """
    config = json.loads((world.model_path / "config.json").read_text())
    return _hook_names(config["num_hidden_layers"])


def check_hook(model_or_config: Any, hook_name: str) -> int:
    """Return the hook's layer, or raise ValueError with the valid names and the nearest one.

    `model_or_config` is a World or its WorldEntry, a TransformerLens model or its config, or a
    Hugging Face config (an object or the dictionary read from config.json).
    """
    valid = (
        valid_hooks(model_or_config)
        if isinstance(model_or_config, World)
        else _hook_names(_number_of_layers(model_or_config))
    )
    if hook_name not in valid:
        raise ValueError(unknown_name("hook", hook_name, valid))
    return hook_layer(hook_name)


def unknown_name(kind: str, name: str, valid: Iterable[str]) -> str:
    """Return an error message for an unknown `name`: the valid ones and, if close, the nearest."""
    names = list(valid)
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"unknown {kind} {name!r}: valid are {', '.join(map(repr, names))}{hint}"


def sha256_of_file(path: Path) -> str:
    """Return the sha256 (hex) of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_texts(texts: Iterable[str]) -> str:
    """Return the sha256 (hex) of a list of texts, their order and their borders included.

    That of the list as JSON, of which one text is held at a time.
    """
    digest = hashlib.sha256(b"[")
    for i, text in enumerate(texts):
        digest.update(((", " if i else "") + json.dumps(text)).encode())
    digest.update(b"]")
    return digest.hexdigest()


def sha256_of_questions(questions: Mapping[str, tuple[Question, ...]]) -> str:
    """Return the sha256 (hex) of all questions by data set name."""
    plain = {
        name: [[q.question, list(q.choices), q.answer] for q in questions[name]]
        for name in sorted(questions)
    }
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()


def _files_that_define_the_model(folder: Path) -> list[Path]:
    """Config, weights and tokenizer; other files of the folder do not change what it computes."""
    patterns = ("config.json", "*.safetensors", "tokenizer*.json", "tokenizer.model")
    return sorted({path for pattern in patterns for path in folder.glob(pattern)})


def _hook_names(n_layers: int) -> list[str]:
    return [f"blocks.{layer}.hook_resid_post" for layer in range(n_layers - 1)]


def _number_of_layers(model_or_config: Any) -> int:
    if isinstance(model_or_config, Mapping):
        return int(model_or_config["num_hidden_layers"])
    config = getattr(model_or_config, "cfg", model_or_config)
    for attribute in ("n_layers", "num_hidden_layers"):
        if hasattr(config, attribute):
            return int(getattr(config, attribute))
    raise TypeError(f"{type(model_or_config).__name__} does not say how many layers it has")
