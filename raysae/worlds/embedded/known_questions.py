"""Which questions a model knows, found by SAEBench's own function."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import sae_bench.evals.unlearning.utils.metrics as saebench_metrics
from transformer_lens import HookedTransformer

from raysae.worlds.world import FORGET_SET, World, sha256_of_file, sha256_of_questions

KINDS = ("correct", "correct-iff-question", "correct-no-tricks")
"""SAEBench's kinds: right under all 24 permutations of the choices; and wrong in one of them
without the question; and (of the first) without a choice like 'All of the above'."""


def find_known_questions(
    model: HookedTransformer, world: World, batch_size: int = 128
) -> dict[str, dict[str, list[int]]]:
    """Return sorted question ids by kind and data set.

    Takes about two minutes of one CPU thread per 1000 questions of the embedded world.
    """
    rows = {
        name: [
            {"question": q.question, "choices": list(q.choices), "answer": q.answer}
            for q in questions
        ]
        for name, questions in world.questions.items()
    }

    def load_dataset(path: str, name: str, split: str) -> list[dict[str, Any]]:
        del path, split  # SAEBench asks for cais/wmdp or cais/mmlu; the name alone tells which set
        return rows[name]

    # SAEBench also splits the ids at random (a split that is not kept here).
    random_state = np.random.get_state()
    ids: dict[str, dict[str, list[int]]] = {kind: {} for kind in KINDS}
    try:
        with (
            tempfile.TemporaryDirectory() as artifacts,
            mock.patch.object(saebench_metrics, "load_dataset", load_dataset),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            for name in rows:
                saebench_metrics.save_target_question_ids(model, batch_size, artifacts, name)
                prefix = name if name == FORGET_SET else f"mmlu-{name.replace('_', '-')}"
                for kind in KINDS:
                    path = Path(artifacts, "data/question_ids/all", f"{prefix}_{kind}.csv")
                    ids[kind][name] = sorted(map(int, path.read_text().split()))
    finally:
        np.random.set_state(random_state)
    return ids


def write_known_questions(path: Path, ids: dict[str, dict[str, list[int]]], world: World) -> None:
    """Write `ids` with the checksums of the weights and of the questions they belong to."""
    contents = {
        "weights_sha256": sha256_of_file(world.model_path / "model.safetensors"),
        "questions_sha256": sha256_of_questions(world.questions),
        "ids": ids,
    }
    path.write_text(json.dumps(contents) + "\n")
