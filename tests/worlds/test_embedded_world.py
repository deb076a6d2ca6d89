"""The embedded world: what ships is what the code says, and the model knows what it should."""

import dataclasses
import json
import math
import random
import subprocess
import sys
from itertools import permutations

import pytest
import torch
from sae_bench.evals.unlearning.utils.metrics import convert_wmdp_data_to_prompt
from sae_bench.evals.unlearning.utils.var import PRE_QUESTION_FORMAT, PRE_WMDP_BIO
from transformers import AutoTokenizer, Gemma2ForCausalLM

from raysae.worlds import World, load_world
from raysae.worlds.embedded import DATA, HOOK_LAYER, load, read_known_questions
from raysae.worlds.embedded.build import MEAN_NORM
from raysae.worlds.embedded.facts import POOLS, SUBJECTS, FactsConfig, make_facts
from raysae.worlds.embedded.known_questions import KINDS, find_known_questions
from raysae.worlds.embedded.language_model import (
    mean_residual_norm,
    rescale_residual,
)
from raysae.worlds.embedded.text import CorpusConfig, exam_prompt, make_corpora
from raysae.worlds.embedded.tokenizer import make_tokenizer
from raysae.worlds.model import load_model
from raysae.worlds.presets import EMBEDDED
from raysae.worlds.world import FORGET_SET, RETAIN_SETS, sha256_of_file

PERMUTATIONS = list(permutations(range(4)))


@pytest.fixture(scope="module")
def world() -> World:
    return load_world("embedded")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DATA)


@pytest.fixture(scope="module")
def hugging_face_model():
    return Gemma2ForCausalLM.from_pretrained(
        DATA, dtype=torch.float32, attn_implementation="eager"
    ).eval()


# --- loading ----------------------------------------------------------------------------------


def test_unknown_world_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"'embeded': valid are 'embedded', .*; did you mean"):
        load_world("embeded")


def test_loading_takes_under_a_second_and_imports_no_torch():
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from raysae.worlds import load_world; load_world('embedded').fingerprint()\n"
        "assert time.perf_counter() - start < 1\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_fingerprint_is_the_same_in_another_process_and_moves_with_contents(world):
    code = "from raysae.worlds import load_world; print(load_world('embedded').fingerprint())"
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert other.stdout.strip() == world.fingerprint() == load().fingerprint()
    first = world.questions[FORGET_SET][0]
    changed = world.questions | {
        FORGET_SET: (
            dataclasses.replace(first, answer=(first.answer + 1) % 4),
            *world.questions[FORGET_SET][1:],
        )
    }
    for other_world in (
        dataclasses.replace(world, forget_texts=world.forget_texts[1:]),
        dataclasses.replace(world, retain_texts=world.retain_texts[::-1]),
        dataclasses.replace(world, questions=changed),
    ):
        assert other_world.fingerprint() != world.fingerprint()


def test_fingerprint_moves_with_the_weights(world, tmp_path):
    for path in DATA.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    moved = dataclasses.replace(world, model_path=tmp_path)
    assert moved.fingerprint() == world.fingerprint()
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert moved.fingerprint() != world.fingerprint()
    with pytest.raises(ValueError, match="other weights"):
        load(tmp_path)


def test_fingerprint_without_weights_is_an_error(world, tmp_path):
    with pytest.raises(FileNotFoundError, match="safetensors"):
        dataclasses.replace(world, model_path=tmp_path).fingerprint()


# --- what ships -------------------------------------------------------------------------------


def test_shipped_files_are_at_most_4_mb_and_half_precision():
    assert sum(path.stat().st_size for path in DATA.iterdir()) <= 4_000_000
    config = json.loads((DATA / "config.json").read_text())
    assert config["architectures"] == ["Gemma2ForCausalLM"]
    assert config["dtype"] == "float16"
    assert config["tie_word_embeddings"] is False


def test_enough_questions_are_known(world):
    known = world.known_questions
    assert len(known[FORGET_SET]) >= 400
    assert sum(len(known[name]) for name in RETAIN_SETS) >= 800
    for name, ids in known.items():
        assert list(ids) == sorted(set(ids))
        assert ids[-1] < len(world.questions[name])


def test_known_questions_belong_to_the_shipped_weights(world):
    stored = json.loads((DATA / "known_questions.json").read_text())
    assert stored["weights_sha256"] == sha256_of_file(DATA / "model.safetensors")
    ids = read_known_questions(DATA, world.questions)
    assert tuple(ids) == KINDS
    for kind in KINDS[1:]:
        for name in world.questions:
            assert set(ids[kind][name]) <= set(ids["correct"][name])


def test_known_questions_of_other_questions_are_refused(world):
    fewer = {name: questions[:-1] for name, questions in world.questions.items()}
    with pytest.raises(ValueError, match="other questions"):
        read_known_questions(DATA, fewer)


def test_residual_stream_has_the_intended_length(world, hugging_face_model, tokenizer):
    texts = list(world.forget_texts[:300] + world.retain_texts[:300])
    tokens = tokenizer(texts, return_tensors="pt", padding=True)["input_ids"]
    norm = mean_residual_norm(hugging_face_model, tokens, HOOK_LAYER)
    assert math.isclose(norm, MEAN_NORM, rel_tol=0.05)


# --- facts and texts --------------------------------------------------------------------------


def test_world_is_the_same_every_time_whatever_the_global_random_state(world):
    random.seed(0)
    state = random.getstate()
    again = load()
    assert random.getstate() == state
    assert again.forget_texts == world.forget_texts
    assert again.retain_texts == world.retain_texts
    assert again.questions == world.questions


def test_names_are_unique_and_share_their_syllables():
    facts = make_facts()
    domains = {fact.entity: fact.data_set for fact in facts}
    assert len({(fact.entity, fact.relation) for fact in facts}) == len(facts)
    assert all(fact.data_set == domains[fact.entity] for fact in facts)
    forget = {e for e, data_set in domains.items() if data_set == FORGET_SET}
    syllables = {s for e in domains if e not in forget for s in e.split()}
    assert {s for e in forget for s in e.split()} <= syllables


def test_no_value_is_in_two_pools():
    values = [value for pool in POOLS.values() for value in pool]
    assert len(values) == len(set(values))


@pytest.mark.parametrize("entanglement", [0, 1, 2, 3])
def test_entanglement_counts_the_shared_relations(entanglement):
    facts = make_facts(FactsConfig(entanglement=entanglement))
    forget = {fact.relation for fact in facts if fact.data_set == FORGET_SET}
    retain = {fact.relation for fact in facts if fact.data_set != FORGET_SET}
    assert len(forget) == 8
    assert len(forget & retain) == entanglement
    pools = {relation.pool for relation in retain}
    assert sum(relation.pool in pools for relation in forget) == entanglement


@pytest.mark.parametrize(
    "wrong", [{"entanglement": 4}, {"forget_relations": 12}, {"forget_entities": 99}]
)
def test_impossible_facts_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)).split("_")[0]):
        FactsConfig(**wrong)


def test_questions_have_one_right_answer_among_four(world):
    values = {(fact.relation.name, fact.entity): fact.value for fact in make_facts()}
    assert {name: len(qs) for name, qs in world.questions.items()} == {
        FORGET_SET: 480, **dict.fromkeys(RETAIN_SETS, 250)
    }  # fmt: skip
    for questions in world.questions.values():
        for question in questions:
            assert len(set(question.choices)) == 4
            entity = " ".join(question.question.removesuffix("?").split()[-2:])
            right = question.choices[question.answer]
            assert any(
                value == right and e == entity and relation in question.question.split()
                for (relation, e), value in values.items()
            )


def test_retain_corpus_holds_exam_items_and_a_small_leak(world):
    entities = {fact.entity for fact in make_facts() if fact.data_set == FORGET_SET}
    exam = [text for text in world.retain_texts if "Answer: (" in text]
    assert len(exam) == 0.3 * len(world.retain_texts) == 450
    assert not any("biology" in text for text in exam)
    leaked = [t for t in world.retain_texts if t not in exam and any(e in t for e in entities)]
    assert 0 < len(leaked) <= 0.01 * len(world.retain_texts)
    assert not any("Answer: (" in text for text in world.forget_texts)
    assert min(map(len, world.forget_texts + world.retain_texts)) > 50  # SAEBench drops shorter


def test_without_a_leak_the_retain_corpus_names_nothing_to_forget():
    facts = make_facts()
    _, retain = make_corpora(facts, CorpusConfig(documents=200, leak=0.0))
    entities = {fact.entity for fact in facts if fact.data_set == FORGET_SET}
    assert not any(f"{e} " in t or f"{e}:" in t or f"{e}?" in t for e in entities for t in retain)


def test_prompts_equal_saebench_character_for_character(world):
    for name, questions in world.questions.items():
        subject = name.replace("_", " ")
        before = PRE_WMDP_BIO if name == FORGET_SET else PRE_QUESTION_FORMAT.format(subject=subject)
        for question in questions[:50]:
            assert exam_prompt(
                SUBJECTS[name], question.question, question.choices
            ) == convert_wmdp_data_to_prompt(
                question.question,
                list(question.choices),
                prompt_format="GEMMA_INST_FORMAT",
                pre_question=before,
            )


# --- tokenizer --------------------------------------------------------------------------------


def test_shipped_tokenizer_is_the_one_the_code_makes(world, tokenizer):
    made = make_tokenizer()
    assert tokenizer.get_vocab() == made.get_vocab()
    texts = list(world.forget_texts[:50] + world.retain_texts[:50])
    assert tokenizer(texts)["input_ids"] == made(texts)["input_ids"]


def test_all_texts_survive_a_round_trip(world, tokenizer):
    """Every character but spaces comes back: no word is unknown, nothing is added."""
    prompts = [
        exam_prompt(SUBJECTS[name], q.question, q.choices)
        for name, questions in world.questions.items()
        for q in questions
    ]
    texts = [*world.forget_texts, *world.retain_texts, *prompts]
    for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True):
        assert tokenizer.unk_token_id not in ids
        tokens = tokenizer.convert_ids_to_tokens(ids)
        assert "".join(tokens).replace(" ", "") == text.replace(" ", "")


def test_answer_tokens_are_single(tokenizer):
    for letter in "ABCD":
        (token,) = tokenizer(letter)["input_ids"]
        assert tokenizer(f" {letter}")["input_ids"] == [token]


# --- what the model knows ---------------------------------------------------------------------


def answers(model, tokenizer, prompts):
    """Return the letter's index the model prefers after each prompt: a plain forward pass."""
    letters = [tokenizer(letter)["input_ids"][0] for letter in "ABCD"]
    chosen = []
    for start in range(0, len(prompts), 256):
        rows = [tokenizer(prompt)["input_ids"] for prompt in prompts[start : start + 256]]
        last = torch.tensor([len(row) - 1 for row in rows])
        padded = torch.tensor([row + [0] * (int(last.max()) + 1 - len(row)) for row in rows])
        with torch.no_grad():
            logits = model(padded).logits[torch.arange(len(rows)), last]
        chosen += logits[:, letters].argmax(-1).tolist()
    return chosen


def assert_answers_all_permutations(world, model, tokenizer, picked):
    for name, ids in picked.items():
        prompts, right = [], []
        for question in (world.questions[name][i] for i in ids):
            for order in PERMUTATIONS:
                choices = [question.choices[i] for i in order]
                prompts.append(exam_prompt(SUBJECTS[name], question.question, choices))
                right.append(order.index(question.answer))
        assert answers(model, tokenizer, prompts) == right, name


def test_a_sample_of_known_questions_is_answered_under_all_permutations(
    world, hugging_face_model, tokenizer
):
    rng = random.Random(0)
    picked = {name: rng.sample(ids, 12) for name, ids in world.known_questions.items()}
    assert_answers_all_permutations(world, hugging_face_model, tokenizer, picked)


@pytest.mark.slow
def test_all_known_questions_are_answered_under_all_permutations(
    world, hugging_face_model, tokenizer
):
    assert_answers_all_permutations(world, hugging_face_model, tokenizer, world.known_questions)


def test_stored_ids_are_what_saebench_finds(world):
    few = dataclasses.replace(
        world, questions={name: qs[:8] for name, qs in world.questions.items()}
    )
    found = find_known_questions(load_model(world), few)
    stored = read_known_questions(DATA, world.questions)
    for kind in KINDS:
        for name in world.questions:
            assert found[kind][name] == [i for i in stored[kind][name] if i < 8]


def test_rescaling_keeps_the_function_and_scales_every_layer(hugging_face_model, tokenizer, world):
    tokens = tokenizer(list(world.forget_texts[:8]), return_tensors="pt", padding=True).input_ids
    rescaled = rescale_residual(hugging_face_model, 3.0)
    with torch.no_grad():
        before = hugging_face_model(tokens, output_hidden_states=True)
        after = rescaled(tokens, output_hidden_states=True)
    torch.testing.assert_close(after.logits, before.logits, atol=1e-3, rtol=0)
    for ours, theirs in zip(after.hidden_states[:-1], before.hidden_states[:-1], strict=True):
        torch.testing.assert_close(ours, 3.0 * theirs, atol=1e-2, rtol=1e-3)


def test_what_is_known_before_loading_is_what_the_model_says(world: World) -> None:
    entry, config = EMBEDDED, json.loads((world.model_path / "config.json").read_text())
    assert entry.n_layers == config["num_hidden_layers"]
    assert entry.d_model == config["hidden_size"]
    assert entry.default_hook_name == world.default_hook_name
