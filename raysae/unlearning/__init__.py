"""The SAEBench unlearning score of an SAE: by SAEBench itself, and by a far faster equal.

    config = default_eval_config(world)
    cache = build_cache(world, model, hook_name, config)          # once per search
    result = CachedEvaluator(world, model, cache, config).evaluate(sae, training_steps=2500)
    result.score, result.status, result.cause

`SAEBenchEvaluator` is the reference the fast one is tested against, question by question.
"""

from raysae.unlearning.cache import EvaluationCache, build_cache
from raysae.unlearning.cached import CachedEvaluator
from raysae.unlearning.halves import Halves, halve, split_questions
from raysae.unlearning.known import Answers, ask_all
from raysae.unlearning.protocol import check_sae, default_eval_config, sae_cfg_dict
from raysae.unlearning.result import Intervention, UnlearningResult, UnlearningStatus
from raysae.unlearning.saebench import SAEBenchEvaluator
from raysae.unlearning.scoring import best_row, unlearning_score

__all__ = [
    "Answers",
    "CachedEvaluator",
    "EvaluationCache",
    "Halves",
    "Intervention",
    "SAEBenchEvaluator",
    "UnlearningResult",
    "UnlearningStatus",
    "ask_all",
    "best_row",
    "build_cache",
    "check_sae",
    "default_eval_config",
    "halve",
    "sae_cfg_dict",
    "split_questions",
    "unlearning_score",
]
