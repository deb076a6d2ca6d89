"""Small models with tokenizers of their family's form, and data sets as the hub has them, on disk.

A folder holds them as OWNER/NAME, as a world's `folder` does.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Features, Value, disable_progress_bars
from datasets import Sequence as ListOf
from huggingface_hub._local_folder import write_download_metadata
from safetensors.torch import load_file, save_file
from tiny_models import gpt_neox, llama
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from raysae.worlds import World, load_world
from raysae.worlds.embedded import DATA
from raysae.worlds.world import FORGET_SET, RETAIN_SETS, Question

# The chat templates of google/gemma-2-2b-it and meta-llama/Meta-Llama-3-8B-Instruct.
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + "
    "message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{'<start_of_turn>model\n'}}{% endif %}"
)
LLAMA_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim "
    "+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MMLU = Features(
    {
        "question": Value("string"),
        "subject": Value("string"),
        "choices": ListOf(Value("string")),
        "answer": ClassLabel(names=["A", "B", "C", "D"]),
    }
)
WMDP = Features(
    {"answer": Value("int64"), "question": Value("string"), "choices": ListOf(Value("string"))}
)
BIO = "cais/wmdp-bio-forget-corpus"
WIKITEXT = "Salesforce/wikitext"


def gemma_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Of Gemma's form: spaces as ▁, bytes for what is unknown, begins every text with <bos>."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    backend = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("(?=▁)|\n"), behavior="isolated")
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    _train(backend, texts, 700, special + bytes_)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    return _fast(backend, "<bos>", "<eos>", template=GEMMA_TEMPLATE, pad_token="<pad>")


def pythia_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Of GPT-NeoX's form: one token begins and ends texts, none pads, nothing is added."""
    special = ["<|endoftext|>", "<|padding|>"]
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    _train(backend, texts, 500, special, pre_tokenizers.ByteLevel.alphabet())
    backend.decoder = decoders.ByteLevel()
    return _fast(backend, "<|endoftext|>", "<|endoftext|>", add_bos=False)


def llama_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Of Llama 3's form: begins every text, has a chat template and no padding token."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"]
    special += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    _train(backend, texts, 500, special, pre_tokenizers.ByteLevel.alphabet())
    backend.decoder = decoders.ByteLevel()
    return _fast(backend, "<|begin_of_text|>", "<|eot_id|>", template=LLAMA_TEMPLATE)


def _train(
    backend: Tokenizer,
    texts: Sequence[str],
    size: int,
    special: list[str],
    alphabet: list[str] | None = None,
) -> None:
    letters = ["A B C D A"] * 1000  # each letter becomes a token, with a space and without
    trainer = BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=alphabet or list("ABCD"),
        show_progress=False,
    )
    backend.train_from_iterator([*letters, *texts], trainer)


def _fast(
    backend: Tokenizer,
    bos: str,
    eos: str,
    *,
    template: str | None = None,
    add_bos: bool = True,
    **options: Any,
) -> PreTrainedTokenizerFast:
    if add_bos:
        ids = [(bos, backend.token_to_id(bos))]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=ids
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, unk_token=None, **options
    )
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def write_gemma(folder: Path, noise: float = 0.0) -> Path:
    """The embedded world's model, which knows its questions, with gemma's chat template.

    Args:
        folder: must not exist.
        noise: on every matrix of its weights, in their standard deviations: another model of the
            same form, as a base model is to its instruct model.
    """
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        if (DATA / name).exists():
            shutil.copy(DATA / name, folder)
    if noise:
        weights = load_file(folder / "model.safetensors")
        generator = torch.Generator().manual_seed(0)
        for weight in weights.values():
            if weight.ndim > 1:
                drawn = torch.randn(weight.shape, generator=generator)
                weight += noise * weight.float().std() * drawn.to(weight.dtype)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    tokenizer = AutoTokenizer.from_pretrained(DATA)
    tokenizer.chat_template = GEMMA_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def write_random(folder: Path, family: str, texts: Sequence[str]) -> Path:
    """A GPT-NeoX (``neox``) or Llama (``llama``) model of random weights: it knows by chance."""
    tokenizer = (pythia_tokenizer if family == "neox" else llama_tokenizer)(texts)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    form = gpt_neox if family == "neox" else llama
    config = form(vocab_size=512, max_position_embeddings=512, pad_token_id=None, **ids)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for weight in model.parameters():
            weight += (0.3 if weight.ndim > 1 else 0.1) * torch.randn_like(weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def small_world(n_forget: int = 40, n_retain: int = 20, n_texts: int = 300) -> World:
    """The first questions and texts of the embedded world."""
    world = load_world("embedded")
    sizes = {FORGET_SET: n_forget} | dict.fromkeys(RETAIN_SETS, n_retain)
    return replace(
        world,
        forget_texts=world.forget_texts[:n_texts],
        retain_texts=world.retain_texts[:n_texts],
        questions={name: world.questions[name][:n] for name, n in sizes.items()},
        known_questions=None,
    )


def write_data(root: Path, world: World) -> Path:
    """The world's questions and texts as the four repositories SAEBench reads, in Parquet."""
    bio = Dataset.from_dict(rows(world.questions[FORGET_SET]), features=WMDP)
    write_data_set(root / "cais/wmdp", {(FORGET_SET, "test"): bio})
    subjects = {
        (name, "test"): Dataset.from_dict(rows(world.questions[name], name), features=MMLU)
        for name in RETAIN_SETS
    }
    write_data_set(root / "cais/mmlu", subjects)
    texts = {"title": ["t"] * len(world.forget_texts), "text": list(world.forget_texts)}
    write_data_set(root / BIO, {("default", "train"): Dataset.from_dict(texts)})
    pages = Dataset.from_dict({"text": ["", " = Heading = \n", *world.retain_texts]})
    write_data_set(root / WIKITEXT, {("wikitext-2-raw-v1", "test"): pages})
    return root


def write_data_set(folder: Path, splits: dict[tuple[str, str], Dataset]) -> None:
    """As a repository on the hub: Parquet files by (configuration, split), and a card for them."""
    lines = ["---", "configs:"]
    disable_progress_bars()
    for (config, split), data in splits.items():
        path = folder / config / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        data.to_parquet(path)
        lines += [f"- config_name: {config}", "  data_files:", f"  - split: {split}"]
        lines += [f"    path: {config}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def note_downloads(folder: Path, commit: str) -> None:
    """What `hf download --local-dir` notes beside the files: the commit that they are of."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        write_download_metadata(folder, str(path.relative_to(folder)), commit, "etag")


def rows(questions: Sequence[Question], subject: str | None = None) -> dict[str, list[Any]]:
    """Columns of a data set of questions."""
    columns: dict[str, list[Any]] = {
        "question": [q.question for q in questions],
        "choices": [list(q.choices) for q in questions],
        "answer": [q.answer for q in questions],
    }
    return columns if subject is None else columns | {"subject": [subject] * len(questions)}


def json_lines(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    """Write one object a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def questions_as_json_lines(path: Path, questions: Sequence[Question]) -> Path:
    """Write questions one a line, as a `local` world reads them."""
    return json_lines(
        path,
        [{"question": q.question, "choices": q.choices, "answer": q.answer} for q in questions],
    )
