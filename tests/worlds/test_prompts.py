"""Prompts of gemma-2 worlds equal SAEBench's, character for character and id for id."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from sae_bench.evals.unlearning.utils import metrics
from sae_bench.evals.unlearning.utils.var import PRE_QUESTION_FORMAT, PRE_WMDP_BIO
from small_hub import gemma_tokenizer, llama_tokenizer, pythia_tokenizer, small_world
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

from raysae.unlearning import ask_all, default_eval_config
from raysae.unlearning.protocol import saebench_session
from raysae.worlds.model import load_model
from raysae.worlds.prompts import ANSWERS, GEMMA_2, PromptFormat, plain, prompt_format
from raysae.worlds.tokens import with_padding
from raysae.worlds.world import FORGET_SET, PERMUTATIONS, Question, World

AWKWARD = (
    Question(
        "Which enzyme (EC 2.7.7.7)\ncopies DNA?", ("polymerase ", "", " a\nb", "β-lactamase"), 0
    ),
    Question("{prompt} or %s or {0}?", ("A", "B.", "<eos>", "D)"), 3),
    Question("¿Qué?  Two  spaces", ("naïve", "日本", "\\n", "(A"), 2),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A gemma-2 of random weights whose tokenizer is of Gemma's own form and has its template."""
    folder = tmp_path_factory.mktemp("gemma")
    small = small_world(6, 2, 40)
    questions = {name: (*AWKWARD, *asked) for name, asked in small.questions.items()}
    tokenizer = gemma_tokenizer([*small.forget_texts, *small.retain_texts])
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, initializer_range=0.5,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Gemma2ForCausalLM._from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    loaded = AutoTokenizer.from_pretrained(folder)
    return dataclasses.replace(
        small, model_path=folder, questions=questions, prompt=prompt_format(loaded, "auto")
    )


def by_saebench(world: World, name: str, index: int, order: Any, **options: Any) -> str:
    question = world.questions[name][index]
    subject = PRE_QUESTION_FORMAT.format(subject=name.replace("_", " "))
    prompt: str = metrics.convert_wmdp_data_to_prompt(
        question.question,
        list(question.choices),
        prompt_format="GEMMA_INST_FORMAT",
        pre_question=PRE_WMDP_BIO if name == FORGET_SET else subject,
        permute_choices=list(order),
        **options,
    )
    return prompt


def test_gemmas_chat_template_is_saebenchs_format(world: World):
    assert world.prompt == GEMMA_2
    for name, questions in world.questions.items():
        for index in range(len(questions)):
            for order in PERMUTATIONS[4]:
                assert world.ask(name, index, order) == by_saebench(world, name, index, order)
    question = AWKWARD[0]
    assert GEMMA_2.ask(
        "biology", question.question, question.choices, without_question=True
    ) == by_saebench(world, FORGET_SET, 0, range(4), without_question=True)


def test_the_tokens_that_the_model_sees_are_saebenchs(world: World):
    """Both ways, through all of SAEBench's own code: with its prompts, and with the world's."""
    world = dataclasses.replace(world, permutations=4)
    model = load_model(world)
    config = default_eval_config(world)
    served = dataclasses.replace(world, prompt=dataclasses.replace(GEMMA_2, name="another object"))
    seen: dict[str, list[list[int]]] = {}
    for which, asked in (("SAEBench", world), ("served", served)):
        rows = seen.setdefault(which, [])
        listening = model.register_forward_hook(
            lambda _model, inputs, _output, rows=rows: rows.extend(inputs[0].tolist())
        )
        ask_all(asked, model, config)
        listening.remove()
    assert seen["SAEBench"] == seen["served"]
    first = seen["SAEBench"][0]
    expected = AutoTokenizer.from_pretrained(world.model_path).encode(
        by_saebench(world, FORGET_SET, 0, range(4)), add_special_tokens=False
    )
    assert first[: len(expected)] == expected
    assert first.count(model.tokenizer.bos_token_id) == 1
    assert set(first[len(expected) :]) <= {model.tokenizer.pad_token_id}
    ids = model.to_tokens(list(ANSWERS), prepend_bos=False)
    assert ids.shape == (8, 1)
    vocabulary = model.tokenizer.get_vocab()
    assert ids.flatten().tolist() == [vocabulary[a.replace(" ", "▁")] for a in ANSWERS]


def test_a_domain_of_ones_own_is_asked_about_by_its_subject(world: World):
    own = dataclasses.replace(
        world,
        forget_subject="alchemy",
        questions={FORGET_SET: AWKWARD, "biology": AWKWARD},
    )
    prompts: list[str] = []

    def remember(_model: Any, asked: list[str], **_: Any) -> torch.Tensor:
        prompts.extend(asked)
        return torch.eye(4)[torch.zeros(len(asked), dtype=torch.long)]

    model = load_model(own)
    config = default_eval_config(own)
    assert config.dataset_names == [FORGET_SET, "biology"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "get_output_probs_abcd", remember)
        answers = ask_all(own, model, config)
    assert len(prompts) == 2 * 3 * 24
    assert all("about alchemy.\n" in prompt for prompt in prompts[:72])
    assert all("about biology.\n" in prompt for prompt in prompts[72:])
    # Whoever always says A is right in six orders of 24, and under none of them all.
    assert answers.right[FORGET_SET].sum(axis=1).tolist() == [6, 6, 6]
    assert answers.counts() == {FORGET_SET: 0, "biology": 0}
    assert answers.counts(1) == {FORGET_SET: 1, "biology": 1}
    with saebench_session(own, model, 0), pytest.raises(TypeError):
        metrics.convert_wmdp_data_to_prompt()  # the session's own, which needs a question


@pytest.mark.parametrize(
    ("make", "expected", "padding"),
    [
        (pythia_tokenizer, plain("<|endoftext|>"), "<|padding|>"),
        (
            llama_tokenizer,
            PromptFormat(
                "chat",
                "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
                "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nAnswer: (",
            ),
            "<|finetune_right_pad_id|>",
        ),
    ],
)
def test_other_families_are_asked_in_their_own_frame(make: Any, expected: Any, padding: str):
    tokenizer = make(["some text to train on"])
    assert prompt_format(tokenizer, "auto") == expected
    assert prompt_format(tokenizer, "plain") == plain(tokenizer.bos_token)
    assert with_padding(tokenizer) == padding == tokenizer.pad_token


def test_plain_prompts_are_saebenchs_plain_prompts():
    question = AWKWARD[0]
    theirs = metrics.convert_wmdp_data_to_prompt(question.question, list(question.choices))
    assert plain("<s>").ask("biology", question.question, question.choices) == "<s>" + theirs


def test_a_padding_token_must_be_a_third_one():
    tokenizer = pythia_tokenizer(["some text"])
    with pytest.raises(ValueError, match=r"'<\|endoftext\|>' is not in the vocabulary, or begins"):
        with_padding(tokenizer, "<|endoftext|>")
    with pytest.raises(ValueError, match="'<none>' is not in the vocabulary"):
        with_padding(tokenizer, "<none>")
    assert with_padding(tokenizer, "<|padding|>") == "<|padding|>"


def test_a_template_is_needed_to_chat():
    with pytest.raises(ValueError, match="no chat template; valid: auto, plain, gemma-2"):
        prompt_format(pythia_tokenizer(["some text"]), "chat")
