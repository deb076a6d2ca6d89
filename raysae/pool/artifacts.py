"""What a trial leaves on disk: its SAELens SAE, SAEBench's result JSON, its conditioning table."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sae_bench.evals.unlearning.eval_config import UnlearningEvalConfig

from raysae.analysis.conditioning import conditioning_table
from raysae.analysis.seeds import ALL_QUESTIONS, SEARCH_HALF
from raysae.pool.folder import RESULT_FILE, SAE_FOLDER, TRIAL_FILE
from raysae.training.run import Rung, SAERun
from raysae.training.spec import TrialSpec
from raysae.unlearning import halve, sae_cfg_dict
from raysae.worlds import World
from raysae.worlds.world import score_name

GROUPS_FILE = "groups.npz"
"""Group labels at every rung: arrays (d_sae,) named by the training step."""
DENSE_RATE = 0.1
"""A feature is dense if it fires on more than this share of the tokens (of both corpora alike)."""


@dataclass(frozen=True)
class Artifacts:
    """The folder of one SAE; a later rung overwrites the SAE of the one before."""

    folder: Path
    world: World
    hook_name: str
    eval_config: UnlearningEvalConfig
    split_seed: int
    """Of the questions' halves."""
    frontier_weight: float
    """Of the frontier in what the sampler is told."""
    seed_index: int = 0
    """Of the SAE in its trial."""

    def measure(self, run: SAERun) -> list[dict[str, Any]]:
        """Conditioning of an SAE that is not scored now, as rows of plain data.

        Without random baselines and without single groups, which are most of the work; no rows for
        weights that are not finite, of which the next row of the curve says that they diverged.
        """
        if not bool(torch.isfinite(run.sae.W_dec).all()):
            return []
        forget_rate, retain_rate = run.firing.rates()
        return _plain(
            conditioning_table(
                run.sae.W_dec.detach().float().cpu().numpy(),
                forget_rate.cpu().numpy(),
                retain_rate.cpu().numpy(),
                trial=run.spec.number,
                step=run.step,
                seed=self.seed_index,
                baseline_draws=0,
            )
        )

    def write(
        self, spec: TrialSpec, rung: Rung, probing: dict[str, float] | None = None
    ) -> dict[str, Any]:
        """Write everything and return the rung as plain data, for the journal.

        Of an SAE that was asked the search half alone there is no SAEBench result: SAEBench's score
        is that of all questions.

        Args:
            spec: of the SAE.
            rung: the scored SAE, on all questions or on the search half of `split_seed`.
            probing: sparse-probing accuracies of the same SAE, where they were asked for.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        rung.sae.save_model(self.folder / SAE_FOLDER)
        about = {"spec": spec.to_dict(), "training_steps": rung.step, "tokens": rung.tokens}
        (self.folder / TRIAL_FILE).write_text(json.dumps(about, indent=1), encoding="utf-8")
        if rung.result.partial:
            # Of the rung before, by a version that asked everything there.
            (self.folder / RESULT_FILE).unlink(missing_ok=True)
        else:
            self._write_saebench_result(spec, rung)
        groups = None if rung.groups is None else rung.groups.cpu().numpy()
        rates = rung.forget_rate.cpu().numpy(), rung.retain_rate.cpu().numpy()
        table = conditioning_table(
            rung.sae.W_dec.detach().cpu().numpy(),
            *rates,
            groups,
            self._previous_groups(groups, rung.step),
            trial=spec.number,
            step=rung.step,
            seed=self.seed_index,
        )
        halves = halve(rung.result, self.split_seed)
        search = halves.search
        return {
            "step": rung.step,
            "tokens": rung.tokens,
            "last": rung.last,
            "objective": search.score + self.frontier_weight * search.frontier,
            "score": search.score,
            "status": search.status.value,
            "cause": search.cause,
            "questions": SEARCH_HALF if rung.result.partial else ALL_QUESTIONS,
            "heldout_score": None if halves.heldout is None else halves.heldout.score,
            "transferred_score": None if halves.transferred is None else halves.transferred.score,
            "saebench_score": None if rung.result.partial else rung.result.score,
            "halves": halves.to_dict(),
            "result": rung.result.to_dict(),
            "sparse_probing": probing,
            "metrics": rung.metrics,
            "dense_features": int(((rates[0] + rates[1]) / 2 > DENSE_RATE).sum()),
            "conditioning": _plain(table),
            "measured": rung.measured,
            "train_seconds": rung.train_seconds,
            "score_seconds": rung.score_seconds,
        }

    def _write_saebench_result(self, spec: TrialSpec, rung: Rung) -> None:
        output = rung.result.to_saebench_output(
            self.eval_config,
            sae_cfg_dict(rung.sae, self.world, self.hook_name),
            sae_release=f"raysae_trial_{spec.number:04d}",
        )
        assert output.eval_result_unstructured is not None
        output.eval_result_unstructured["score_name"] = score_name(self.world.permutations)
        output.to_json_file(str(self.folder / RESULT_FILE), indent=1)

    def _previous_groups(self, groups: np.ndarray | None, step: int) -> np.ndarray | None:
        """The labels of the rung before, kept in the folder with those of this one."""
        if groups is None:
            return None
        path = self.folder / GROUPS_FILE
        kept: dict[str, np.ndarray] = {}
        if path.exists():
            with np.load(path) as saved:
                # A trial that began again finds the labels of its first attempt.
                kept = {name: saved[name] for name in saved.files if int(name) < step}
        # The next worker reads it if this one is killed meanwhile.
        partial = path.with_suffix(".partial.npz")
        try:
            np.savez_compressed(partial, **kept, **{str(step): groups})
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return kept[max(kept, key=int)] if kept else None


def _plain(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of a table as JSON knows them, None for what is undefined."""
    rows: list[Any] = table.astype(object).where(table.notna(), None).to_dict("records")
    return rows
