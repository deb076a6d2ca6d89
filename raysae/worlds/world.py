"""What a world is: a language model's folder, two corpora and multiple-choice questions about them.

A world is everything the SAEBench unlearning score needs besides a sparse autoencoder. This module
imports neither torch nor transformers, so that an entry point can check names before they load.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysae.worlds.prompts import GEMMA_2, PromptFormat
from raysae.worlds.texts import Texts, TextsOnDisk, sha256_of_texts

if TYPE_CHECKING:
    from raysae.worlds.spec import HubWorld, LocalWorld

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
PERMUTATIONS: dict[int, tuple[tuple[int, ...], ...]] = {
    24: tuple(itertools.permutations(range(4))),
    4: tuple(tuple((shift + i) % 4 for i in range(4)) for shift in range(4)),
    1: ((0, 1, 2, 3),),
}
"""Orders of the choices under which a question must be answered right to count as known, by their
number: SAEBench's 24; 4 in which every choice stands once at every letter; the one as written."""

SAEBENCH = "SAEBench"


def score_name(permutations: int) -> str:
    """Name of the score on questions that are known under so many orders of their choices."""
    if permutations == len(PERMUTATIONS[24]):
        return SAEBENCH
    return f"score of {permutations} order{'s' if permutations > 1 else ''}"


CONTEXT = 2048
"""Positions that are kept room for, where a model has more: every layer holds a mask of its square,
which for the 131 072 of Llama 3.1 would be 17 GB. SAEBench's prompts and sequences are shorter."""

_ASKED_AS = "gemma-2-2b-it"
"""SAEBench's way to find the answer among the next tokens, which every model gets."""

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
    """Hugging Face folder: config, weights, tokenizer. The SAEs are trained on this model."""
    saebench_model_name: str
    """Name of the model that is asked, for example ``gemma-2-2b-it``."""
    default_hook_name: str
    """TransformerLens name of the residual-stream hook the autoencoders are trained at."""
    seq_len: int
    """Tokens per sequence when the corpora are tokenised and concatenated."""
    forget_texts: Texts
    retain_texts: Texts
    questions: Mapping[str, tuple[Question, ...]]
    """By data set name: ``FORGET_SET`` whatever is forgotten, and those to retain, SAEBench's being
    the ``RETAIN_SETS``."""
    known_questions: Mapping[str, tuple[int, ...]] | None
    """Ids (positions in ``questions``) answered right under all 24 permutations of the choices,
    SAEBench's kind ``correct``; None where they must be computed."""
    probe_texts: Mapping[str, Mapping[str, tuple[str, ...]]] | None = None
    """``train`` and ``test``: texts by class, for sparse probing; None for SAEBench's own."""
    score_model_path: Path | None = None
    """Folder of the model that is asked and intervened on; None: `model_path`."""
    trained_on: str | None = None
    """Name of the model that the SAEs are trained on; None: that of the one that is asked."""
    training_texts: Mapping[str, Texts] = field(default_factory=dict)
    """By ``forget`` and ``retain``: what SAEs are trained on where it is not the corpus by which
    their features are chosen."""
    store_tokens: int | None = None
    """Of either corpus, to train on; None: all."""
    prompt: PromptFormat = GEMMA_2
    forget_subject: str = "biology"
    """In the prompts of `FORGET_SET`; a retain set's name says its own."""
    permutations: int = 24
    """See `PERMUTATIONS`."""
    dtype: str = "float32"
    """The model runs in it; torch's name."""
    llm_batch_size: int = 64
    """Sequences the model runs at a time; of questions, twice as many."""
    pad_token: str | None = None
    """None: the tokenizer's own."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Where model and data came from, commits included; decides nothing."""

    @property
    def asked_path(self) -> Path:
        """Folder of the model that is asked."""
        return self.score_model_path or self.model_path

    @property
    def sae_model_name(self) -> str:
        """Name of the model that the SAEs are trained on."""
        return self.trained_on or self.saebench_model_name

    @property
    def d_model(self) -> int:
        """Dimensions of the residual stream."""
        return int(read_model_config(self.model_path)["hidden_size"])

    def subject(self, data_set: str) -> str:
        """What the questions of a data set are about, as the prompts say it."""
        return self.forget_subject if data_set == FORGET_SET else data_set.replace("_", " ")

    def ask(self, data_set: str, index: int, order: Sequence[int] = (0, 1, 2, 3)) -> str:
        """The prompt of a question with its choices in that order."""
        question = self.questions[data_set][index]
        choices = [question.choices[i] for i in order]
        return self.prompt.ask(self.subject(data_set), question.question, choices)

    def __post_init__(self) -> None:
        """Raise ValueError, naming what is wrong, for questions and corpora that cannot score."""
        check_corpus(f"world {self.name!r}: forget corpus", self.forget_texts)
        check_corpus(f"world {self.name!r}: retain corpus", self.retain_texts)
        check_questions(f"world {self.name!r}", self.questions)

    def fingerprint(self) -> str:
        """Return the sha256 (hex) of everything that decides the numbers.

        Model or models, corpora, questions, and how they are put. Depends on contents only, never
        on where the world lies or what its folders are called, so that results of different
        machines can be compared. Raises FileNotFoundError if a folder holds no weights.
        """
        plain = [
            self.model_fingerprint(),
            self.questions_fingerprint(),
            sha256_of_texts(self.forget_texts),
            sha256_of_texts(self.retain_texts),
            {name: sha256_of_texts(texts) for name, texts in sorted(self.training_texts.items())},
            [None, self.seq_len, self.store_tokens],  # None: worlds hash as they always have
        ]
        return hashlib.sha256(json.dumps(plain).encode()).hexdigest()

    def model_fingerprint(self) -> str:
        """Return the sha256 (hex) of what computes the activations; raises as above."""
        plain = [_sha256_of_model(self.model_path), self.dtype, self.pad_token]
        return hashlib.sha256(json.dumps(plain).encode()).hexdigest()

    def questions_fingerprint(self) -> str:
        """Return the sha256 (hex) of what decides which questions are known; raises as above."""
        plain = [
            _sha256_of_model(self.asked_path),
            sha256_of_questions(self.questions),
            [_ASKED_AS, self.forget_subject, vars(self.prompt)],
            [self.permutations, self.dtype, self.llm_batch_size, self.pad_token],
        ]
        return hashlib.sha256(json.dumps(plain).encode()).hexdigest()


def check_corpus(what: str, texts: Texts) -> None:
    """Raise ValueError for a corpus of which SAEBench would use no text; `what` names it.

    Those on disk are checked by who reads them: most processes do not.
    """
    if isinstance(texts, TextsOnDisk):
        return
    if not any(len(text) > MIN_CHARACTERS for text in texts):
        raise ValueError(
            f"{what}: {len(texts)} texts, none of more than {MIN_CHARACTERS} characters; SAEBench "
            "drops shorter ones, and at least one is needed"
        )


def check_questions(what: str, questions: Mapping[str, Sequence[Question]]) -> None:
    """Raise ValueError for missing data sets and for questions SAEBench cannot ask."""
    missing = [name for name in (FORGET_SET, *questions) if not questions.get(name)]
    if missing:
        raise ValueError(
            f"{what}: no questions for {', '.join(missing)}; every data set needs some"
        )
    if len(questions) < 2:
        raise ValueError(f"{what}: no questions to retain, only {FORGET_SET}; one set is needed")
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


WORLDS = ("embedded", "gemma-2-2b", "pythia-70m")
"""Names of worlds; those of the hub are described in `raysae.worlds.presets`."""


def load_world(world: str | HubWorld | LocalWorld, *, checked: bool = False) -> World:
    """Return the world of that name or description; raises ValueError for an unknown name.

    Raises UserError for what is missing or malformed, see `raysae.worlds.load`. With `checked`
    texts and prompts are not looked at, because another process has done so: its corpora are then
    read by who goes through them, and not at all by who needs the model only.
    """
    if isinstance(world, str) and world not in WORLDS:
        raise ValueError(unknown_name("world", world, WORLDS))
    if world == "embedded":
        from raysae.worlds import embedded  # here, because that package imports this module

        return embedded.load()
    from raysae.worlds import load, presets

    spec = presets.PRESETS[world] if isinstance(world, str) else world
    return load.load(spec, checked=checked)


def hook_layer(hook_name: str) -> int:
    """Return L of ``blocks.L.hook_resid_post``; raises ValueError for any other form."""
    match = _HOOK.fullmatch(hook_name)
    if match is None:
        raise ValueError(
            f"hook name {hook_name!r} is not of the form 'blocks.L.hook_resid_post' "
            "(L the layer, counted from 0)"
        )
    return int(match.group(1))


def middle_hook(n_layers: int) -> str:
    """The hook of a model of so many layers where nobody names one."""
    return f"blocks.{max(0, (n_layers - 1) // 2)}.hook_resid_post"


def valid_hooks(world: World) -> list[str]:
    """Return the hook names an autoencoder can be trained at, first layer first.

    Reads ``num_hidden_layers`` from the folder's config.json. The last layer is left out: no layer
    follows it, so that an intervention there could only rewrite the logits.
    """
    return _hook_names(int(read_model_config(world.model_path)["num_hidden_layers"]))


def read_model_config(folder: Path) -> dict[str, Any]:
    """Return a model folder's config.json."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def check_hook(model_or_config: Any, hook_name: str) -> int:
    """Return the hook's layer, or raise ValueError with the valid names and the nearest one.

    `model_or_config` is a World or its `Shape`, a TransformerLens model or its config, or a
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
    """Return the sha256 (hex) of a file's bytes, read once until the file changes."""
    stat = path.stat()
    return _sha256_of_file(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=256)
def _sha256_of_file(path: Path, size: int, mtime_ns: int) -> str:
    del size, mtime_ns  # they tell one state of a file from the next
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_questions(questions: Mapping[str, tuple[Question, ...]]) -> str:
    """Return the sha256 (hex) of all questions by data set name."""
    plain = {
        name: [[q.question, list(q.choices), q.answer] for q in questions[name]]
        for name in sorted(questions)
    }
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()


def _sha256_of_model(folder: Path) -> str:
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"no *.safetensors weights in {folder}")
    digest = hashlib.sha256()
    for path in _files_that_define_the_model(folder):
        digest.update(f"{path.name}\0{sha256_of_file(path)}\0".encode())
    return digest.hexdigest()


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
