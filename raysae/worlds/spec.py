"""What a user says of a world of their own: a model, two domains with texts and questions.

Typed, and free of torch and transformers: a mistake is found before anything loads. Paths are
absolute once validated; relative ones start at the folder of the file in which they are written
(`context={"folder": …}`), or at the working directory, as do those of the command line (`Typed`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from raysae.worlds.world import FORGET_SET, PERMUTATIONS, RETAIN_SETS

TEXT_FORMATS = (".txt", ".jsonl", ".json", ".parquet", ".csv")
QUESTION_FORMATS = (".jsonl", ".json", ".csv", ".parquet")
NOT_A_NAME = "college_biology"
"""SAEBench leaves a data set of this name out of what is to be retained."""

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_SET_NAME = re.compile(r"[a-z0-9_]+")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    def __hash__(self) -> int:
        return hash(self.model_dump_json())


class Typed(str):
    """Text of the command line: a relative path in it starts at the working directory, whatever
    file it is set in."""

    __slots__ = ()


def typed(value: Any) -> Any:
    """The same value, all texts in it `Typed`."""
    if isinstance(value, dict):
        return {key: typed(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [typed(inner) for inner in value]
    return Typed(value) if isinstance(value, str) else value


def _absolute(value: Any, info: ValidationInfo) -> Any:
    """A path as text, absolute."""
    if not isinstance(value, str | Path):
        return value
    folder = (info.context or {}).get("folder") or Path.cwd()
    if isinstance(value, Typed):
        folder = Path.cwd()
    return str((Path(folder) / Path(value).expanduser()).absolute())


FilePath = Annotated[str, BeforeValidator(_absolute)]


class Source(_Strict):
    """Rows: a file or folder on this machine (`path`), or a data set of the hub (`dataset`).

    Written as plain text it is a path.
    """

    formats: ClassVar[tuple[str, ...]] = ()

    path: FilePath | None = Field(
        None, description="a file, or a folder laid out like a data set of the hub"
    )
    dataset: str | None = Field(None, description="OWNER/NAME on the hub")
    config: str | None = Field(None, description="configuration of the data set")
    split: str = "train"
    revision: str | None = Field(None, description="commit, tag or branch; default: the newest")

    @model_validator(mode="before")
    @classmethod
    def _plain_text_is_a_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_of_two(self) -> Source:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("needs either 'path' (a file or folder) or 'dataset' (OWNER/NAME)")
        if self.dataset is not None and not _REPOSITORY.fullmatch(self.dataset):
            raise ValueError(f"dataset {self.dataset!r} is not OWNER/NAME; for a file use 'path'")
        suffix = Path(self.path or "").suffix
        if suffix and suffix not in self.formats and not Path(self.path or "").is_dir():
            raise ValueError(
                f"{self.path}: files of {suffix!r} are not read; valid: {', '.join(self.formats)}, "
                "or a folder"
            )
        return self


class Corpus(Source):
    """Texts: paragraphs of a .txt file, or one column of the rows of anything else."""

    formats: ClassVar[tuple[str, ...]] = TEXT_FORMATS

    column: str = "text"
    max_texts: int | None = Field(None, ge=1, description="the first so many; default: all")


class Questions(Source):
    """Multiple-choice questions: rows of `question`, four `choices`, and `answer` (0-3 or A-D)."""

    formats: ClassVar[tuple[str, ...]] = QUESTION_FORMATS

    split: str = "test"


class Domain(_Strict):
    """Texts of a domain. The SAEs are trained on them, and choose their features by them."""

    corpus: Corpus
    training_corpus: Corpus | None = Field(
        None, description="trained on instead; the features are still chosen by `corpus`"
    )


class ForgetDomain(Domain):
    """What is to be forgotten."""

    questions: Questions
    subject: str = Field("biology", description="in the prompt: «questions about SUBJECT»")


class RetainDomain(Domain):
    """What is to be retained."""

    questions: dict[str, Questions] = Field(
        min_length=1, description="by subject; underscores are spaces in the prompt"
    )

    @field_validator("questions")
    @classmethod
    def _names_can_be_told_apart(cls, value: dict[str, Questions]) -> dict[str, Questions]:
        for name in value:
            if not _SET_NAME.fullmatch(name) or name == NOT_A_NAME:
                raise ValueError(
                    f"{name!r} cannot name a set of questions: lower-case letters, digits and "
                    f"underscores, but not {NOT_A_NAME!r}, which SAEBench leaves out"
                )
        return value


class WmdpBio(ForgetDomain):
    """SAEBench's domain to forget. Its corpus is gated: ask for it, or give your own file."""

    corpus: Corpus = Corpus(dataset="cais/wmdp-bio-forget-corpus")
    questions: Questions = Questions(dataset="cais/wmdp", config=FORGET_SET)


class WikiTextAndMmlu(RetainDomain):
    """SAEBench's domain to retain."""

    corpus: Corpus = Corpus(dataset="Salesforce/wikitext", config="wikitext-2-raw-v1", split="test")
    questions: dict[str, Questions] = Field(
        {name: Questions(dataset="cais/mmlu", config=name) for name in RETAIN_SETS}, min_length=1
    )


class _Settings(_Strict):
    """What worlds of both kinds share; all of it decides the numbers."""

    name: str | None = Field(None, description="in what is printed; default: the model's")
    hook: str | None = Field(None, description="default hook point; default: of the middle layer")
    seq_len: int = Field(1024, ge=8, description="tokens of a sequence of the corpora")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="the model runs in it")
    llm_batch_size: int = Field(
        64, ge=1, description="sequences that the model runs at a time; questions: twice as many"
    )
    prompt: Literal["auto", "chat", "plain", "gemma-2"] = Field(
        "auto",
        description="chat: the tokenizer's template; plain: none; gemma-2: SAEBench's; auto: chat "
        "where there is a template, else plain",
    )
    pad_token: str | None = Field(None, description="for a tokenizer without one of its own")
    permutations: Literal[24, 4, 1] = Field(
        24,
        description="orders of the choices under which a known question is answered right: 24 "
        "(SAEBench's), 4 (each choice once at every letter), 1 (as written); with fewer than 24 "
        "the score goes by another name",
    )
    store_tokens: int | None = Field(
        None, ge=8, description="of either corpus, to train on; default: all"
    )

    @property
    def label(self) -> str:
        """Name in what is printed."""
        return self.name or Path(self.model).name  # type: ignore[attr-defined]


class HubWorld(_Settings):
    """A causal language model of the hub; by default with the questions and texts of SAEBench."""

    kind: Literal["hub"] = "hub"
    model: str = Field(description="OWNER/NAME on the hub, or a folder; SAEs are trained on it")
    revision: str | None = Field(None, description="commit, tag or branch; default: the newest")
    score_model: str | None = Field(None, description="is asked and intervened on; default: model")
    score_revision: str | None = None
    folder: FilePath | None = Field(
        None, description="holds models and data sets as OWNER/NAME, looked at before the hub"
    )
    forget: WmdpBio = WmdpBio()
    retain: WikiTextAndMmlu = WikiTextAndMmlu()

    @field_validator("model", "score_model", mode="before")
    @classmethod
    def _folder_or_repository(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, str):
            return value
        folder = _absolute(value, info)
        if Path(folder).is_dir():
            return str(folder)
        if not _REPOSITORY.fullmatch(value):
            raise ValueError(f"{value!r} is neither a folder ({folder}) nor OWNER/NAME on the hub")
        return value


class LocalWorld(_Settings):
    """A model folder, questions and texts in plain files."""

    kind: Literal["local"]
    model: FilePath = Field(description="folder: config.json, *.safetensors, tokenizer")
    score_model: FilePath | None = Field(None, description="is asked; default: model")
    forget: ForgetDomain
    retain: RetainDomain

    @model_validator(mode="after")
    def _files_only(self) -> LocalWorld:
        for field, source in sources_of(self):
            if source.dataset is not None:
                raise ValueError(
                    f"{field}: dataset {source.dataset!r} is on the hub; a world of kind 'local' "
                    "takes files only ('path'), kind 'hub' takes both"
                )
        return self


KINDS: dict[str, type[HubWorld | LocalWorld]] = {"hub": HubWorld, "local": LocalWorld}


def _kind(value: Any) -> str:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return kind if kind in KINDS else "unknown"


def _no_kind(value: Any) -> Any:
    has_kind = isinstance(value, dict) and "kind" in value
    found = f"kind {value['kind']!r}" if has_kind else repr(value)
    raise ValueError(f"needs 'kind: hub' or 'kind: local', or the name of a world; got {found}")


WorldSpec = Annotated[
    Annotated[HubWorld, Tag("hub")]
    | Annotated[LocalWorld, Tag("local")]
    | Annotated[Any, BeforeValidator(_no_kind), Tag("unknown")],
    Discriminator(_kind),
]
"""A world of the user's own, either kind."""


def written_out(world: Any) -> Any:
    """Every field of a world's description as plain mappings, so that any can be set by itself.

    Of a mapping, one that may have mistakes, the domains that it leaves to SAEBench; anything that
    is no description as it is.
    """
    if isinstance(world, HubWorld | LocalWorld):
        return world.model_dump()
    if not isinstance(world, dict) or world.get("kind") != "hub":
        return world
    domains: dict[str, Domain] = {"forget": WmdpBio(), "retain": WikiTextAndMmlu()}
    filled = dict(world)
    for side, domain in domains.items():
        written = world.get(side) or {}
        if isinstance(written, dict):
            filled[side] = domain.model_dump() | written
    return filled


def sources_of(spec: HubWorld | LocalWorld) -> list[tuple[str, Source]]:
    """Every source of rows with the field that names it."""
    found: list[tuple[str, Source]] = []
    for side, domain in (("forget", spec.forget), ("retain", spec.retain)):
        found.append((f"{side}.corpus", domain.corpus))
        if domain.training_corpus is not None:
            found.append((f"{side}.training_corpus", domain.training_corpus))
    found.append(("forget.questions", spec.forget.questions))
    found += [(f"retain.questions.{n}", q) for n, q in spec.retain.questions.items()]
    return found


assert set(PERMUTATIONS) == {24, 4, 1}
