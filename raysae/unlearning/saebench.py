"""The reference evaluator: SAEBench's own functions, called on a world's own data."""

from __future__ import annotations

import pickle
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sae_bench.evals.unlearning.eval_config import UnlearningEvalConfig
from sae_bench.evals.unlearning.main import get_metrics_df, get_unlearning_scores
from sae_bench.evals.unlearning.utils.eval import run_eval_single_sae
from sae_bench.evals.unlearning.utils.feature_activation import load_sparsity_data
from sae_bench.evals.unlearning.utils.metrics import get_baseline_metrics
from sae_bench.sae_bench_utils.general_utils import str_to_dtype
from transformer_lens import HookedTransformer

from raysae.unlearning.grid import GridPoint, choose_features, eligible_features
from raysae.unlearning.known import known_question_ids
from raysae.unlearning.protocol import (
    KNOWN_KIND,
    saebench_session,
    saebench_view,
    write_question_ids,
)
from raysae.unlearning.result import (
    MIN_KNOWN_QUESTIONS,
    UNTRAINED_CAUSE,
    UnlearningResult,
    UnlearningStatus,
    check_questions,
    make_result,
    refused,
    too_few_known,
)
from raysae.worlds.world import World, check_hook


class SAEBenchEvaluator:
    """Scores SAEs by SAEBench's `run_eval_single_sae`, `get_metrics_df`, `get_unlearning_scores`.

    Question ids and the baseline are found once, as in SAEBench, whose artifacts folder keeps
    them. Every SAE gets a folder of its own in it, deleted afterwards: SAEBench scores all pickles
    it finds under an SAE's name, so that a re-used name would contaminate the score.
    """

    name = "saebench"

    def __init__(
        self,
        world: World,
        model: HookedTransformer,
        hook_name: str,
        config: UnlearningEvalConfig,
        work_dir: Path,
        *,
        min_known: int = MIN_KNOWN_QUESTIONS,
    ) -> None:
        """Find the known questions and lay out SAEBench's artifacts below `work_dir`.

        Args:
            world: questions and corpora.
            model: the world's, in TransformerLens.
            hook_name: ``blocks.L.hook_resid_post``; ValueError if the model lacks it.
            config: see `default_eval_config`.
            work_dir: made if missing; a fresh folder in it is used and deleted with this object.
            min_known: known questions needed of the forget set and of the retain sets together.
        """
        self.world, self.model, self.hook_name, self.config = world, model, hook_name, config
        self.layer = check_hook(model, hook_name)
        work_dir.mkdir(parents=True, exist_ok=True)
        self._artifacts = Path(tempfile.mkdtemp(prefix="saebench-", dir=work_dir))
        weakref.finalize(self, shutil.rmtree, self._artifacts, ignore_errors=True)
        ids = known_question_ids(world, model, config)
        write_question_ids(self._artifacts, ids)
        self.known_questions = {name: len(known) for name, known in ids.items()}
        """Known questions by data set."""
        self._too_few = too_few_known(self.known_questions, min_known)

    def evaluate_many(
        self,
        saes: Sequence[Any],
        *,
        training_steps: int,
        questions: Mapping[str, np.ndarray] | None = None,
    ) -> list[UnlearningResult]:
        """Score several SAEs, one after the other."""
        return [
            self.evaluate(sae, training_steps=training_steps, questions=questions) for sae in saes
        ]

    def evaluate(
        self,
        sae: Any,
        *,
        training_steps: int,
        questions: Mapping[str, np.ndarray] | None = None,
    ) -> UnlearningResult:
        """Score one inference SAE in raw activation units with unit-norm decoder rows.

        Args:
            sae: SAELens' or one of SAEBench's custom ones.
            training_steps: it was trained for. An SAE of none is refused with the status
                `untrained`, not evaluated.
            questions: by data set, bool (known questions,): the result is on these only. SAEBench
                asks all of them all the same, in batches that decide the last digits of its
                arithmetic.

        Raises ValueError for an SAE that cannot be scored, see `saebench_view`, and for questions
        that are not the known ones.
        """
        if training_steps == 0:
            return refused(self.name, UnlearningStatus.untrained, UNTRAINED_CAUSE)
        if self._too_few:
            return refused(self.name, UnlearningStatus.too_few_known_questions, self._too_few)
        if questions is not None:
            check_questions(questions, self.known_questions)
        dtype = str_to_dtype(self.config.llm_dtype)
        view = saebench_view(sae, self.world, self.hook_name, dtype, str(self.model.cfg.device))
        sae_name = f"sae-{uuid.uuid4().hex}"
        try:
            result = self._run(view, sae_name)
            return result if questions is None else result.on(questions)
        finally:
            shutil.rmtree(self._artifacts / sae_name, ignore_errors=True)

    def prepare(self) -> None:
        """Find the baseline answers, which SAEBench otherwise finds with the first SAE."""
        with saebench_session(self.world, self.model, self.config.random_seed):
            self._baseline()

    def _baseline(self) -> dict[str, np.ndarray]:
        """By data set, bool (questions,); SAEBench keeps the answers in its artifacts folder."""
        right = {}
        for name in self.config.dataset_names:
            answers = get_baseline_metrics(
                self.model,
                self.config.llm_batch_size * 2,
                str(self._artifacts),
                name,
                {"target_metric": KNOWN_KIND},
            )
            right[name] = np.asarray(answers["is_correct"]).astype(bool)
        return right

    def _run(self, view: Any, sae_name: str) -> UnlearningResult:
        config, artifacts = self.config, str(self._artifacts)
        folder = self._artifacts / sae_name / "results" / "metrics"
        with saebench_session(self.world, self.model, config.random_seed):
            run_eval_single_sae(self.model, view, config, artifacts, sae_name, True)
            score = float(get_unlearning_scores(get_metrics_df(str(folder))))
            forget_sparsity, retain_sparsity = load_sparsity_data(artifacts, sae_name)
            baseline = self._baseline()
        grid = choose_features(forget_sparsity, retain_sparsity, config)
        rows = [_read_answers(folder, point, self.layer, config) for point in grid]
        return make_result(
            evaluator=self.name,
            score=score,
            grid=grid,
            is_correct={n: np.stack([row[n] for row in rows]) for n in config.dataset_names},
            baseline=baseline,
            forget_sparsity=forget_sparsity,
            retain_sparsity=retain_sparsity,
            eligible=eligible_features(forget_sparsity, retain_sparsity, config),
        )


def _read_answers(
    folder: Path, point: GridPoint, layer: int, config: UnlearningEvalConfig
) -> dict[str, np.ndarray]:
    """By data set, bool (questions,), from the pickle SAEBench wrote for this intervention.

    SAEBench names the file after the features actually used. When fewer are eligible than
    requested, n=10 and n=20 are the same intervention under the same name: SAEBench's table then
    has 12 or 8 rows instead of 16, with the same minimum and hence the same score. Here both
    requests read the one file.
    """
    path = folder / (
        f"{config.intervention_method}_multiplier{point.multiplier}"
        f"_nfeatures{len(point.features)}_layer{layer}_retainthres{point.retain_threshold}.pkl"
    )
    with path.open("rb") as file:
        answers = pickle.load(file)
    used = tuple(int(f) for f in answers["ablate_params"]["features_to_ablate"])
    if used != point.features:
        raise RuntimeError(f"{path.name} holds features {used}, expected {point.features}")
    return {name: answers[name]["is_correct"].astype(bool) for name in config.dataset_names}
