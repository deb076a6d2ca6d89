"""What a model knows, under all orders or fewer, and what is said when it is too little."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sae_bench.evals.unlearning.utils import metrics
from unlearning_bench import Bench

from raysae.errors import UserError
from raysae.unlearning import Answers, ask_all, build_cache
from raysae.worlds.world import FORGET_SET, PERMUTATIONS, RETAIN_SETS, score_name


def answers(forget: np.ndarray, retain: np.ndarray, asked: int = 24) -> Answers:
    return Answers({FORGET_SET: forget} | dict.fromkeys(RETAIN_SETS, retain), asked)


def test_fewer_orders_are_among_all_and_show_every_choice_at_every_letter():
    assert set(PERMUTATIONS[1]) < set(PERMUTATIONS[4]) < set(PERMUTATIONS[24])
    for letter in range(4):
        assert sorted(order[letter] for order in PERMUTATIONS[4]) == [0, 1, 2, 3]
    assert len(set(PERMUTATIONS[24])) == 24


def test_a_question_is_known_under_the_orders_that_are_asked():
    right = np.ones((40, 24), dtype=bool)
    right[0, PERMUTATIONS[24].index((0, 1, 2, 3))] = False
    right[1, PERMUTATIONS[24].index((3, 0, 1, 2))] = False
    right[2, PERMUTATIONS[24].index((1, 0, 2, 3))] = False
    found = answers(right, right)
    assert found.ids()[FORGET_SET].tolist() == list(range(3, 40))
    assert found.ids(4)[FORGET_SET].tolist() == list(range(2, 40))
    assert found.ids(1)[FORGET_SET].tolist() == list(range(1, 40))


def test_a_model_that_knows_enough_is_not_complained_about(bench: Bench):
    right = np.ones((20, 24), dtype=bool)
    assert answers(right, right).weakness(bench.world) is None


def test_a_weak_model_is_told_with_its_counts_and_what_can_be_done(bench: Bench):
    forget, retain = np.zeros((80, 24), dtype=bool), np.zeros((50, 24), dtype=bool)
    forget[:30, PERMUTATIONS[24].index((0, 1, 2, 3))] = True
    retain[:12, PERMUTATIONS[24].index((0, 1, 2, 3))] = True
    retain[:5] = True
    message = answers(forget, retain).weakness(bench.world)
    assert message is not None
    for part in (
        "gemma-2-2b-it is too weak for this protocol: it answers 0 of 80 wmdp-bio, 5 of 50 high",
        "right under all 24 orders of the choices, and at least 20 to forget, 20 to retain",
        "another model",
        "world.permutations=4: 0 wmdp-bio, 5 high_school_us_history, ",
        "known under 4 orders, which is too few; ",
        "world.permutations=1: 30 wmdp-bio, 12 high_school_us_history, ",
        "known under the one order, which is enough (guessing gets a quarter of all); the score is "
        "then called 'score of 1 order' and compares with none of SAEBench's",
    ):
        assert part in message
    fewer = answers(forget[:, :1], retain[:, :1], asked=1).weakness(bench.world)
    assert fewer is None or "permutations=4" not in fewer


@pytest.mark.parametrize(
    ("permutations", "name"),
    [(24, "SAEBench"), (4, "score of 4 orders"), (1, "score of 1 order")],
)
def test_only_saebenchs_own_protocol_is_called_by_its_name(permutations: int, name: str):
    assert score_name(permutations) == name


@pytest.mark.parametrize("phase", ["questions", "corpora"])
def test_a_gpu_that_holds_no_batch_is_said_as_the_setting_to_change(
    phase: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
):
    def run_out(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6.10 GiB.\nGPU 0 has …")

    size = bench.config.llm_batch_size
    wanted = (
        rf"world\.llm_batch_size: .* of {size} sequences or {2 * size} prompts, .*"
        rf"6\.10 GiB\.\); set it lower than {size}, or world\.dtype to bfloat16"
    )
    if phase == "questions":
        monkeypatch.setattr(metrics, "get_output_probs_abcd", run_out)
        with pytest.raises(UserError, match=wanted):
            ask_all(bench.world, bench.model, bench.config)
        return
    monkeypatch.setattr(bench.model, "run_with_cache", run_out)
    with pytest.raises(UserError, match=wanted):
        build_cache(bench.world, bench.model, bench.hook_name, bench.config)
