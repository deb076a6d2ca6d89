"""Worlds of the hub, from small checkpoints and data sets in the hub's own formats, offline."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from huggingface_hub._local_folder import write_download_metadata
from huggingface_hub.errors import GatedRepoError
from sae_bench.sae_bench_utils.activation_collection import (
    LLM_NAME_TO_BATCH_SIZE,
    LLM_NAME_TO_DTYPE,
)
from small_hub import (
    BIO,
    WIKITEXT,
    json_lines,
    note_downloads,
    rows,
    small_world,
    write_data,
    write_gemma,
    write_random,
)

from raysae.config import find_space, load_config
from raysae.errors import UserError
from raysae.store.activations import corpus_tokens
from raysae.unlearning import ask_all, default_eval_config
from raysae.worlds import World, hub, load_world
from raysae.worlds.embedded import DATA
from raysae.worlds.model import load_model, load_tokenizer
from raysae.worlds.presets import PRESETS, SIZES, Shape, label_of, shape_of
from raysae.worlds.prompts import GEMMA_2
from raysae.worlds.spec import HubWorld
from raysae.worlds.world import FORGET_SET, RETAIN_SETS, WORLDS, middle_hook

REVISION = "0123456789abcdef0123456789abcdef01234567"
GEMMA = "tiny/gemma-2-2b-it"


@pytest.fixture(scope="module")
def small() -> World:
    return small_world(n_forget=6, n_retain=3, n_texts=60)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, small: World) -> Path:
    """OWNER/NAME: three models and the four data sets."""
    root = write_data(tmp_path_factory.mktemp("hub"), small)
    texts = [*small.forget_texts, *small.retain_texts]
    write_gemma(root / GEMMA)
    write_random(root / "tiny/neox", "neox", texts)
    write_random(root / "tiny/llama", "llama", texts)
    return root


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "hub_answers", lambda: False)


def spec(root: Path, model: str = GEMMA, **fields: Any) -> HubWorld:
    return HubWorld(model=model, folder=str(root), seq_len=64, **fields)


@pytest.mark.parametrize(
    ("model", "prompt", "padding"),
    [
        (GEMMA, "gemma-2", None),
        ("tiny/neox", "plain", "<|padding|>"),
        ("tiny/llama", "chat", "<|finetune_right_pad_id|>"),
    ],
)
def test_every_family_loads_and_is_asked(
    root: Path, small: World, model: str, prompt: str, padding: str | None
):
    world = load_world(spec(root, model, permutations=1))
    assert (world.prompt.name, world.pad_token) == (prompt, padding)
    assert world.questions == small.questions
    texts = tuple(world.forget_texts), tuple(world.retain_texts)
    assert texts == (small.forget_texts, small.retain_texts)
    assert world.known_questions is None
    loaded = load_model(world)
    tokens = corpus_tokens(world, loaded.tokenizer)
    assert all(part.shape[1] == 64 and len(part) > 1 for part in tokens.values())
    alone = load_tokenizer(world)
    for name, part in corpus_tokens(world, alone).items():
        np.testing.assert_array_equal(part, tokens[name])
    assert alone.special_tokens_map == loaded.tokenizer.special_tokens_map
    assert alone.padding_side == loaded.tokenizer.padding_side
    assert bool((tokens["forget"][:, 0] == loaded.tokenizer.bos_token_id).all())
    with torch.no_grad():
        assert bool(torch.isfinite(loaded(torch.from_numpy(tokens["retain"][:2]))).all())
    answers = ask_all(world, loaded, default_eval_config(world))
    assert {name: right.shape for name, right in answers.right.items()} == {
        name: (len(asked), 1) for name, asked in small.questions.items()
    }
    if model == GEMMA:  # the embedded world's model, which knows everything
        assert answers.counts() == {name: len(asked) for name, asked in small.questions.items()}


@pytest.mark.usefixtures("no_hub")
def test_the_hubs_own_cache_is_read_with_its_commits(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def store(repository: str, kind: str) -> None:
        folder = tmp_path / f"{kind}--{repository.replace('/', '--')}"
        shutil.copytree(root / repository, folder / "snapshots" / REVISION)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(REVISION)

    store(GEMMA, "models")
    for repository in ("cais/wmdp", "cais/mmlu", BIO, WIKITEXT):
        store(repository, "datasets")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    cached = load_world(HubWorld(model=GEMMA, seq_len=64))
    assert cached.fingerprint() == load_world(spec(root)).fingerprint()
    assert cached.model_path.name == REVISION
    assert cached.sources["model"] == f"{GEMMA}@{REVISION}"
    assert cached.sources["retain.questions.human_aging"] == f"cais/mmlu@{REVISION}"
    with pytest.raises(UserError, match=r"revision|not on this machine"):
        load_world(HubWorld(model=GEMMA, seq_len=64, revision="0" * 40))


def test_a_copy_says_which_commit_it_was_downloaded_at(root: Path, tmp_path: Path):
    copy = tmp_path / "hub"
    shutil.copytree(root, copy)
    for repository in (GEMMA, BIO):
        note_downloads(copy / repository, REVISION)
    pinned = load_world(spec(copy, revision=REVISION))
    assert pinned.sources["model"] == f"{GEMMA}@{REVISION}"
    assert pinned.sources["forget.corpus"] == f"{BIO}@{REVISION}"
    assert pinned.sources["retain.corpus"] == str(copy / WIKITEXT)  # nobody knows
    other = "f" * 40
    with pytest.raises(UserError) as caught:
        load_world(spec(copy, revision=other))
    assert f"downloaded at commit {REVISION}, and {other} is asked for" in str(caught.value)
    assert f"hf download --revision {other} {GEMMA}" in str(caught.value)
    write_download_metadata(copy / GEMMA, "config.json", other, "etag")  # of two commits now
    assert load_world(spec(copy)).sources["model"] == str(copy / GEMMA)


@pytest.mark.usefixtures("no_hub")
def test_everything_that_is_missing_is_named_at_once(monkeypatch):
    fetched: list[bool] = []
    real = huggingface_hub.snapshot_download

    def fetch(*arguments: Any, **options: Any) -> str:
        fetched.append(options["local_files_only"])
        return real(*arguments, **options)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    with pytest.raises(UserError) as caught:
        load_world("gemma-2-2b")
    message = str(caught.value)
    for part in (
        "'gemma-2-2b' lacks what follows",
        "google/gemma-2-2b (gated: accept its terms at https://huggingface.co/google/gemma-2-2b)",
        "hf download google/gemma-2-2b-it",
        f"datasets/{BIO})",
        "hf download --repo-type dataset cais/wmdp",
        "retain.questions.high_school_us_history, retain.questions.college_computer_science, ",
        "hf download --repo-type dataset Salesforce/wikitext",
        "HF_TOKEN",
        "folder: DIR",
    ):
        assert part in message
    assert message.count("cais/mmlu:") == 1
    assert fetched and all(fetched)  # nothing was waited for


@pytest.mark.usefixtures("no_hub")
def test_a_folder_that_lacks_a_copy_is_named(tmp_path: Path):
    with pytest.raises(UserError) as caught:
        load_world(spec(tmp_path, "tiny/nowhere"))
    assert f"tiny/nowhere: not in {tmp_path}/tiny/nowhere, and not in the" in str(caught.value)


def test_whether_the_hub_answers_is_asked_once(monkeypatch: pytest.MonkeyPatch):
    calls: list[float] = []

    class Session:
        def head(self, url: str, timeout: float) -> None:
            calls.append(timeout)
            raise OSError("Name or service not known")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_session", Session)
    hub._probe.cache_clear()
    assert [hub.hub_answers() for _ in range(3)] == [False] * 3
    assert calls == [hub.PROBE_SECONDS]
    hub._probe.cache_clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert not hub.hub_answers()
    assert len(calls) == 1
    hub._probe.cache_clear()


def test_a_gate_that_is_shut_is_said_to_be(root: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> str:
        raise GatedRepoError.__new__(GatedRepoError)

    monkeypatch.setattr(hub, "hub_answers", lambda: True)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(UserError, match=r"the hub answers[\s\S]*access was not granted"):
        load_world(spec(root, "google/gemma-2-9b-it"))


def test_the_users_own_forget_corpus(root: Path, tmp_path: Path, small: World):
    path = json_lines(
        tmp_path / "bio-forget-corpus.jsonl",
        [{"title": "t", "text": text.upper()} for text in small.forget_texts],
    )
    world = load_world(spec(root, forget={"corpus": str(path)}))
    assert tuple(world.forget_texts) == tuple(text.upper() for text in small.forget_texts)
    assert world.questions == small.questions
    assert world.fingerprint() != load_world(spec(root)).fingerprint()


def test_folders_without_a_card_have_configurations_as_folders(
    root: Path, tmp_path: Path, small: World
):
    shutil.copytree(root / "cais/mmlu", tmp_path / "mmlu")
    (tmp_path / "mmlu" / "README.md").unlink()
    questions = {"human_aging": {"path": str(tmp_path / "mmlu"), "config": "human_aging"}}
    world = load_world(spec(root, retain={"questions": questions}))
    assert world.questions["human_aging"] == small.questions["human_aging"]
    assert set(world.questions) == {FORGET_SET, "human_aging"}
    with pytest.raises(UserError, match=r"human_aging: .*no split 'dev'.*it has .*_aging/test"):
        questions["human_aging"]["split"] = "dev"
        load_world(spec(root, retain={"questions": questions}))


def test_another_folder_of_the_same_name_is_another_data_set(root: Path, tmp_path: Path):
    write_data(tmp_path, small_world(n_forget=9, n_retain=2, n_texts=40))
    assert len(load_world(spec(root)).questions[FORGET_SET]) == 6
    shutil.copytree(root / "tiny", tmp_path / "tiny")
    assert len(load_world(spec(tmp_path)).questions[FORGET_SET]) == 9


def test_trained_on_one_model_and_asked_of_another(root: Path, tmp_path: Path):
    """Of the base model's weights here, with another number somewhere."""
    base = tmp_path / "base"
    shutil.copytree(root / GEMMA, base)
    from safetensors.torch import load_file, save_file

    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    world = load_world(spec(root, str(base), score_model=GEMMA))
    assert (world.sae_model_name, world.saebench_model_name) == ("base", "gemma-2-2b-it")
    trained, asked = load_model(world, trained_on=True), load_model(world)
    assert (trained.cfg.model_name, asked.cfg.model_name) == ("base", "gemma-2-2b-it")
    moved = trained.ln_final.w.detach() - asked.ln_final.w.detach()
    torch.testing.assert_close(moved, torch.ones_like(moved), atol=2e-3, rtol=0)  # kept in float16
    alone = load_world(spec(root))
    assert world.questions_fingerprint() == alone.questions_fingerprint()
    assert world.model_fingerprint() != alone.model_fingerprint()
    with pytest.raises(UserError, match=r"score_model has hidden_size 32, world.model 128"):
        load_world(spec(root, GEMMA, score_model="tiny/llama"))


@pytest.mark.parametrize(
    "change",
    [
        {"permutations": 4},
        {"dtype": "bfloat16"},
        {"prompt": "plain"},
        {"store_tokens": 640},
        {"llm_batch_size": 8},
        {"forget": {"subject": "alchemy"}},
        {"retain": {"training_corpus": {"dataset": BIO}}},
        {"forget": {"corpus": {"dataset": BIO, "max_texts": 30}}},
    ],
    ids=str,
)
def test_whatever_decides_the_numbers_is_in_the_fingerprint(root: Path, change: dict[str, Any]):
    assert load_world(spec(root, **change)).fingerprint() != load_world(spec(root)).fingerprint()


def test_the_place_and_the_name_are_not(root: Path):
    moved = spec(root, name="another", hook="blocks.0.hook_resid_post")
    assert load_world(moved).fingerprint() == load_world(spec(root)).fingerprint()
    named = load_world(moved)
    assert (named.name, named.default_hook_name) == ("another", "blocks.0.hook_resid_post")


def test_neither_are_the_names_of_the_models_folders(root: Path, tmp_path: Path):
    """A folder that was renamed computes what it did: caches and searches go on with it."""
    shutil.copytree(root / GEMMA, tmp_path / "gemma-2-2b-it")
    shutil.copytree(root / GEMMA, tmp_path / "base")
    named, renamed = (
        load_world(spec(root, str(tmp_path / model), score_model=str(tmp_path / score_model)))
        for model, score_model in (("base", "gemma-2-2b-it"), ("gemma-2-2b-it", "base"))
    )
    assert (named.saebench_model_name, renamed.saebench_model_name) == ("gemma-2-2b-it", "base")
    assert renamed.fingerprint() == named.fingerprint()
    assert renamed.questions_fingerprint() == named.questions_fingerprint()


def test_the_tokens_to_train_on_can_be_limited_and_be_others(root: Path, small: World):
    changes: dict[str, Any] = {"retain": {"training_corpus": {"dataset": BIO}}, "store_tokens": 640}
    world = load_world(spec(root, **changes))
    tokens = corpus_tokens(world, load_model(world).tokenizer)
    whole = corpus_tokens(load_world(spec(root)), load_model(world).tokenizer)
    assert tuple(world.retain_texts) == small.retain_texts
    assert {name: len(part) for name, part in tokens.items()} == {"forget": 10, "retain": 10}
    assert (tokens["retain"] == tokens["forget"]).all()
    assert len(whole["forget"]) > 10


# --- What is known before anything is fetched -----------------------------------------------------


@pytest.mark.usefixtures("no_hub")
def test_a_worlds_size_is_known_without_a_network(root: Path):
    hook = "blocks.19.hook_resid_post"
    assert shape_of("gemma-2-2b") == Shape("gemma-2-2b", 26, 2304, hook, 2_000_000)
    assert shape_of("embedded").d_model == 128
    for name in WORLDS:
        assert shape_of(name).n_layers > 1
    assert {spec.model.removesuffix("-deduped") for spec in PRESETS.values()} <= set(SIZES)
    assert shape_of(HubWorld(model="meta-llama/Llama-3.2-1B-Instruct")).d_model == 2048
    assert shape_of(spec(root)).default_hook_name == "blocks.1.hook_resid_post"
    with pytest.raises(UserError, match="hf download some/model"):
        shape_of(HubWorld(model="some/model"))


@pytest.mark.parametrize(("model", "layer"), [(GEMMA, 1), ("tiny/neox", 1)])
def test_the_middle_layer_is_one_before_and_after_a_world_is_loaded(
    root: Path, model: str, layer: int
):
    """Of 4 layers and of 3: a search trains where `raysae world` and `evaluate` look."""
    described = spec(root, model, permutations=1)
    hook = f"blocks.{layer}.hook_resid_post"
    assert shape_of(described).default_hook_name == hook
    assert load_world(described).default_hook_name == hook


@pytest.mark.parametrize("n_layers", range(2, 12))
def test_the_middle_layer_is_a_hook(n_layers: int):
    assert middle_hook(n_layers) in [f"blocks.{i}.hook_resid_post" for i in range(n_layers - 1)]


def test_worlds_are_called_by_their_model_in_what_is_printed():
    described = HubWorld(model="tiny/model").model_dump(mode="json")
    assert label_of(described) == HubWorld(model="tiny/model").label == "model"
    assert label_of(described | {"name": "mine"}) == "mine"
    assert label_of("embedded") == "embedded"


def test_the_presets_are_saebenchs_set_up():
    gemma = PRESETS["gemma-2-2b"]
    assert (gemma.model, gemma.score_model) == ("google/gemma-2-2b", "google/gemma-2-2b-it")
    asked = "gemma-2-2b-it"  # an eighth, as SAEBench's main.py takes of what is for 128 tokens
    assert gemma.llm_batch_size == LLM_NAME_TO_BATCH_SIZE[asked] // 8 == 4
    assert (gemma.dtype, gemma.seq_len) == (LLM_NAME_TO_DTYPE[asked], 1024)
    weak = PRESETS["pythia-70m"]
    assert weak.llm_batch_size == LLM_NAME_TO_BATCH_SIZE["pythia-70m-deduped"] // 8
    written = load_config(find_space("gemma-2-2b.yaml")).world
    assert isinstance(written, HubWorld)
    assert (written.dtype, written.llm_batch_size) == (gemma.dtype, gemma.llm_batch_size)
    assert list(gemma.retain.questions) == list(RETAIN_SETS)
    assert gemma.permutations == 24


# --- What is wrong is said before anything expensive ----------------------------------------------


def folder_like(root: Path, tmp_path: Path, change: str) -> Path:
    """The gemma folder with one thing missing or other."""
    folder = tmp_path / "model"
    shutil.copytree(root / GEMMA, folder)
    if change == "config":
        (folder / "config.json").unlink()
    elif change == "weights":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif change == "tokenizer":
        (folder / "tokenizer.json").unlink()
    elif change == "architecture":
        text = (folder / "config.json").read_text()
        (folder / "config.json").write_text(text.replace("Gemma2ForCausalLM", "MambaForCausalLM"))
    elif change == "json":
        (folder / "config.json").write_text("{")
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "config",
            r"world.model: .*model is no Hugging Face model: it has no config.json \(it",
        ),
        ("weights", r"no \*.safetensors weights \(pytorch_model.bin is pickled: .*save_pretrained"),
        ("tokenizer", r"has no tokenizer \(tokenizer.json or tokenizer.model\)"),
        ("architecture", "MambaForCausalLM is not supported; valid: Gemma2ForCausalLM, GPTNeoX"),
        ("json", r"config.json cannot be read"),
    ],
)
def test_a_folder_that_is_no_model(root: Path, tmp_path: Path, change: str, message: str):
    with pytest.raises(UserError, match=message):
        load_world(spec(root, str(folder_like(root, tmp_path, change))))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hook": "blocks.3.hook_resid_post"}, "world.hook: unknown hook 'blocks.3.*valid are"),
        ({"seq_len": 4096}, r"world.seq_len: 4096 tokens, the model's context has \d+"),
        ({"pad_token": "<none>"}, "pad_token '<none>' is not in the vocabulary"),
        ({"forget": {"corpus": {"dataset": BIO, "column": "body"}}}, r"no text in column 'body'"),
        (
            {"forget": {"corpus": {"dataset": BIO, "max_texts": 1}}},
            r"world.forget.corpus: 1 texts of \d+ tokens in all, at least 128 are needed",
        ),
    ],
)
def test_settings_that_do_not_fit_the_model_or_the_data(root: Path, fields: Any, message: str):
    with pytest.raises(UserError, match=message):
        load_world(HubWorld(**({"model": GEMMA, "folder": str(root), "seq_len": 64} | fields)))


def test_a_prompt_that_does_not_fit_the_context(root: Path, tmp_path: Path, small: World):
    long = rows(small.questions[FORGET_SET])
    questions = [dict(zip(long, row, strict=True)) for row in zip(*long.values(), strict=True)]
    questions[2]["question"] = "spore " * 3000
    path = json_lines(tmp_path / "long.jsonl", questions)
    with pytest.raises(UserError, match=r"question 3 of wmdp-bio makes a prompt of \d{4} tokens"):
        load_world(spec(root, forget={"questions": str(path)}))


def test_the_embedded_model_as_a_folder_is_saebenchs_gemma(root: Path):
    """Without a template it would be asked plainly; the user can say that it is a gemma."""
    assert load_world(spec(root, str(DATA))).prompt.name == "plain"
    assert load_world(spec(root, str(DATA), prompt="gemma-2")).prompt == GEMMA_2
