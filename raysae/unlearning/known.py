"""Which questions a model knows: those it answers right under every order of their choices.

SAEBench's `calculate_MCQ_metrics` asks; 24 forward passes a question. SAEBench's own function for
the ids asks as many again without the question, for two kinds of ids that its score does not use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from sae_bench.evals.unlearning.eval_config import UnlearningEvalConfig
from sae_bench.evals.unlearning.utils import metrics
from transformer_lens import HookedTransformer

from raysae.unlearning.memory import batches_fit
from raysae.unlearning.protocol import saebench_session
from raysae.unlearning.result import MIN_KNOWN_QUESTIONS, too_few_known
from raysae.worlds.world import PERMUTATIONS, World, score_name


@dataclass(frozen=True, eq=False)
class Answers:
    """Right or wrong under every order that was asked."""

    right: Mapping[str, np.ndarray]
    """By data set, bool (questions, orders), orders as in ``PERMUTATIONS[asked]``."""
    asked: int
    """Number of orders: 24, 4 or 1."""

    def ids(self, permutations: int | None = None) -> dict[str, np.ndarray]:
        """By data set, the int ids of the questions right under so many orders, of those asked."""
        wanted = PERMUTATIONS[permutations or self.asked]
        columns = [PERMUTATIONS[self.asked].index(order) for order in wanted]
        return {name: np.flatnonzero(r[:, columns].all(axis=1)) for name, r in self.right.items()}

    def counts(self, permutations: int | None = None) -> dict[str, int]:
        """Known questions by data set."""
        return {name: len(ids) for name, ids in self.ids(permutations).items()}

    def weakness(self, world: World, minimum: int = MIN_KNOWN_QUESTIONS) -> str | None:
        """What to tell the user of a model that knows too little; None where it knows enough."""
        counts = self.counts()
        if too_few_known(counts, minimum) is None:
            return None
        known = ", ".join(f"{n} of {len(self.right[name])} {name}" for name, n in counts.items())
        lines = [
            f"{world.saebench_model_name} is too weak for this protocol: it answers {known} right "
            f"under {_orders(self.asked)} of the choices, and at least {minimum} to forget, "
            f"{minimum} to retain and one of each set are needed",
            "Every score would be 0 or noise, so nothing was trained. What can be done:",
            "  another model (SAEBench recommends instruction-tuned ones of 2 billion parameters "
            "or more); more questions, or easier ones",
        ]
        for fewer in (4, 1):
            if fewer >= self.asked:
                continue
            counts = self.counts(fewer)
            enough = too_few_known(counts, minimum) is None
            lines.append(
                f"  world.permutations={fewer}: {', '.join(f'{n} {k}' for k, n in counts.items())} "
                f"are known under {_orders(fewer)}, which is {'enough' if enough else 'too few'}"
                f"{' (guessing gets a quarter of all)' if fewer == 1 else ''}; the score is then "
                f"called {score_name(fewer)!r} and compares with none of SAEBench's"
            )
        return "\n".join(lines)


def _orders(n: int) -> str:
    return {24: "all 24 orders", 4: "4 orders", 1: "the one order"}[n]


def ask_all(
    world: World,
    model: HookedTransformer,
    config: UnlearningEvalConfig,
    progress: Callable[[str], None] | None = None,
) -> Answers:
    """Ask the model every question in every order of `world.permutations`.

    Args:
        world: its questions and prompts.
        model: the one that is asked, in TransformerLens.
        config: its data sets, batch size and seed.
        progress: called with one line before each data set.

    Raises UserError where a GPU's memory does not hold a batch.
    """
    orders = [list(order) for order in PERMUTATIONS[world.permutations]]
    right = {}
    with saebench_session(world, model, config.random_seed):
        for name in config.dataset_names:
            if progress is not None:
                n = len(world.questions[name])
                progress(f"asking {n} questions of {name} in {len(orders)} orders")
            with batches_fit(config, model.cfg.d_vocab):
                found = metrics.calculate_MCQ_metrics(
                    model, config.llm_batch_size * 2, "", name, permutations=orders, verbose=False
                )
            right[name] = found["is_correct"].astype(bool).reshape(-1, len(orders))
    return Answers(right, world.permutations)


def known_question_ids(
    world: World, model: HookedTransformer, config: UnlearningEvalConfig
) -> dict[str, np.ndarray]:
    """By data set, the int ids of the questions that the model knows.

    `world.known_questions` where it is given; else the model is asked.
    """
    if world.known_questions is not None:
        known = world.known_questions
        return {name: np.asarray(known[name], dtype=int) for name in config.dataset_names}
    return ask_all(world, model, config).ids()
