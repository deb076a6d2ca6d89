"""From a description to a world: everything found, read and checked before anything expensive.

What is wrong is said as one `UserError`: what lacks of the hub, a folder without a model, a row
that is no question, a text column that is not there, a tokenizer SAEBench cannot ask with.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from raysae.errors import UserError, first_line
from raysae.worlds import hub
from raysae.worlds.folder import check_model_folder, check_same_shape
from raysae.worlds.prompts import ANSWERS, PromptFormat, prompt_format
from raysae.worlds.rows import CorpusTexts, read_questions, read_texts
from raysae.worlds.spec import Corpus, HubWorld, LocalWorld, Questions, Source, sources_of
from raysae.worlds.texts import Texts
from raysae.worlds.tokens import with_padding
from raysae.worlds.world import (
    CONTEXT,
    FORGET_SET,
    Question,
    World,
    middle_hook,
    unknown_name,
    valid_hooks,
)


def load(spec: HubWorld | LocalWorld, *, checked: bool = False) -> World:
    """Return the world; fetches what is of the hub and not on this machine.

    With `checked` neither texts nor prompts are looked at: another process has done so.

    Raises UserError, see above.
    """
    shopping = hub.Shopping()
    model_path = hub.model_folder(spec, "model", shopping)
    score_path = None
    if spec.score_model is not None:
        score_path = hub.model_folder(spec, "score_model", shopping)
    places = {name: hub.data_place(spec, name, s, shopping) for name, s in sources_of(spec)}
    shopping.check(spec)
    config = check_model_folder(model_path, "world.model")
    if score_path is not None:
        check_same_shape(config, check_model_folder(score_path, "world.score_model"))

    questions = {FORGET_SET: _questions(spec.forget.questions, "forget.questions", places)}
    for name, source in spec.retain.questions.items():
        questions[name] = _questions(source, f"retain.questions.{name}", places)

    def texts(source: Corpus, name: str) -> CorpusTexts:
        field = f"world.{name}"
        return (CorpusTexts if checked else read_texts)(source, places[name], field)

    asked = Path(spec.score_model or spec.model)
    world = World(
        name=spec.label,
        model_path=model_path,
        saebench_model_name=asked.name,
        default_hook_name="",
        seq_len=spec.seq_len,
        forget_texts=texts(spec.forget.corpus, "forget.corpus"),
        retain_texts=texts(spec.retain.corpus, "retain.corpus"),
        questions=MappingProxyType(questions),
        known_questions=None,
        score_model_path=score_path,
        trained_on=Path(spec.model).name if spec.score_model is not None else None,
        training_texts={
            side: texts(domain.training_corpus, f"{side}.training_corpus")
            for side, domain in (("forget", spec.forget), ("retain", spec.retain))
            if domain.training_corpus is not None
        },
        store_tokens=spec.store_tokens,
        forget_subject=spec.forget.subject,
        permutations=spec.permutations,
        dtype=spec.dtype,
        llm_batch_size=spec.llm_batch_size,
        sources=_origins(spec, model_path, score_path, places),
    )
    prompt, pad_token = _how_to_ask(world, spec, config, checked=checked)
    changes = {"prompt": prompt, "pad_token": pad_token, "default_hook_name": _hook(spec, world)}
    # What this process has found, the ones that it starts need not ask the hub for.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return World(**(vars(world) | changes))


def _questions(source: Questions, name: str, places: dict[str, Path]) -> tuple[Question, ...]:
    return read_questions(source, places[name], f"world.{name}")


def _hook(spec: HubWorld | LocalWorld, world: World) -> str:
    hooks = valid_hooks(world)
    if not hooks:
        raise UserError(f"world.model: {world.model_path} has one layer; at least two are needed")
    hook = spec.hook or middle_hook(len(hooks) + 1)  # behind the last layer is none
    if hook not in hooks:
        raise UserError(f"world.hook: {unknown_name('hook', hook, hooks)}")
    return hook


def _origins(
    spec: HubWorld | LocalWorld, model: Path, score_model: Path | None, places: dict[str, Path]
) -> dict[str, str]:
    """Where things came from; of the hub, with the commit."""

    def of(source: str | None, place: Path) -> str:
        commit = hub.commit_of(place) if source else None
        return str(place) if commit is None else f"{source}@{commit}"

    found = {"model": of(spec.model, model)}
    if score_model is not None:
        found["score_model"] = of(spec.score_model, score_model)
    sources: list[tuple[str, Source]] = sources_of(spec)
    return found | {name: of(source.dataset, places[name]) for name, source in sources}


def _how_to_ask(
    world: World, spec: HubWorld | LocalWorld, config: dict[str, Any], *, checked: bool
) -> tuple[PromptFormat, str | None]:
    """The prompt format, and the padding token where the tokenizer has none of its own."""
    from transformers import AutoTokenizer  # here: it takes a while, and files are checked first

    folder = world.asked_path
    where = f"world.{'score_model' if spec.score_model else 'model'}: {folder}"
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raise whatever their parsers do
        raise UserError(f"{where}: the tokenizer cannot be loaded: {first_line(error)}") from None
    for name in ("bos_token", "eos_token"):
        if getattr(tokenizer, name) is None:
            raise UserError(f"{where}: the tokenizer has no {name}, which SAEBench needs")
    try:
        pad_token = with_padding(tokenizer, spec.pad_token)
        prompt = prompt_format(tokenizer, spec.prompt)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    split = [a for a in ANSWERS if len(tokenizer.encode(a, add_special_tokens=False)) != 1]
    if split:
        raise UserError(
            f"{where}: SAEBench needs each of the answers {', '.join(map(repr, ANSWERS))} to be "
            f"one token; this tokenizer splits {', '.join(map(repr, split))}"
        )
    example = prompt.ask("x", world.questions[FORGET_SET][0].question, ("a", "b", "c", "d"))
    ids = tokenizer.encode(example, add_special_tokens=False)
    if ids[0] != tokenizer.bos_token_id or ids.count(tokenizer.bos_token_id) != 1:
        raise UserError(
            f"{where}: a prompt must begin with the one token {tokenizer.bos_token!r}; the format "
            f"{prompt.name!r} begins {example[:40]!r} (set world.prompt)"
        )
    if checked:
        return prompt, pad_token
    longest = int(config.get("max_position_embeddings", world.seq_len))
    if world.seq_len > longest:
        raise UserError(f"world.seq_len: {world.seq_len} tokens, the model's context has {longest}")
    _check_prompts(tokenizer, replace(world, prompt=prompt), min(longest, CONTEXT))
    corpora = {"forget.corpus": world.forget_texts, "retain.corpus": world.retain_texts}
    corpora |= {f"{side}.training_corpus": texts for side, texts in world.training_texts.items()}
    for name, texts in corpora.items():
        _check_length(tokenizer, texts, world.seq_len, f"world.{name}")
    return prompt, pad_token


def _check_prompts(tokenizer: Any, world: World, longest: int) -> None:
    """A prompt that does not fit would be cut at its end, where the answer is asked for."""
    for name, questions in world.questions.items():
        prompts = [world.ask(name, i) for i in range(len(questions))]
        for i, ids in enumerate(tokenizer(prompts, add_special_tokens=False)["input_ids"]):
            if len(ids) > longest:
                raise UserError(
                    f"world: question {i + 1} of {name} makes a prompt of {len(ids)} tokens, the "
                    f"model's context has {longest}: leave it out"
                )


def _check_length(tokenizer: Any, texts: Texts, seq_len: int, field: str) -> None:
    """A corpus must fill a sequence; two, as SAEBench cuts it into chunks and drops the rest."""
    found = 0
    for text in texts:
        found += len(tokenizer.encode(text, add_special_tokens=False))
        if found >= 2 * seq_len:
            return
    raise UserError(
        f"{field}: {len(texts)} texts of {found} tokens in all, at least {2 * seq_len} are needed "
        f"for two sequences of {seq_len}: more texts, or a smaller world.seq_len"
    )
