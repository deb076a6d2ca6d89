"""SAEBench's k-sparse probing of a trained SAE, on a world's own labelled texts or SAEBench's.

How well do the k best features of an SAE (or all of them) tell classes of texts apart, beside the
language model's own activations? Everything is SAEBench's: `run_eval_single_sae`, its choice of
features by difference of means, its probes. Only the texts come from the world.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jaxtyping
import torch
from sae_bench.evals.sparse_probing import main as probing
from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
from sae_bench.sae_bench_utils import (
    activation_collection,
    dataset_info,
    dataset_utils,
    general_utils,
)
from transformer_lens import HookedTransformer

from raysae.unlearning.protocol import saebench_view
from raysae.worlds.world import World

K_VALUES = (1, 2, 5, 10, 20, 50)


class SparseProbing:
    """Probes SAEs of one world, model and hook; the model's own probes are trained once."""

    def __init__(
        self, world: World, model: HookedTransformer, hook_name: str, work_dir: Path, **changes: Any
    ) -> None:
        """Lay out SAEBench's artifacts below `work_dir`.

        Args:
            world: its `probe_texts`, or SAEBench's data sets where it has none.
            model: the world's, in TransformerLens.
            hook_name: where the SAEs live.
            work_dir: SAEBench keeps activations and the model's own probes there.
            changes: fields of `SparseProbingEvalConfig`.
        """
        self.world, self.model, self.hook_name = world, model, hook_name
        self._work_dir = work_dir
        texts = world.probe_texts
        fields: dict[str, Any] = {
            "model_name": world.sae_model_name,
            "k_values": list(K_VALUES),
            "llm_batch_size": 64,
            "llm_dtype": str(model.cfg.dtype).removeprefix("torch."),
        }
        if texts is not None:
            fields |= {"dataset_names": [world.name], "context_length": world.seq_len}
        self.config = SparseProbingEvalConfig(**(fields | changes))

    def evaluate(self, sae: Any) -> dict[str, float]:
        """Test accuracies, means over classes: of the SAE's features and of the model's own.

        Args:
            sae: inference SAE in raw activation units, see `saebench_view`.

        Returns:
            `sae_top_{k}` for every k, `sae` for all features, and `llm_top_{k}`, `llm` likewise.
        """
        device = str(self.model.cfg.device)
        dtype = general_utils.str_to_dtype(self.config.llm_dtype)
        view = saebench_view(sae, self.world, self.hook_name, dtype, device)
        with self._session():
            results, _ = probing.run_eval_single_sae(
                self.config, view, self.model, device, str(self._work_dir), True
            )
        return {
            name.removesuffix("_test_accuracy"): float(value)
            for name, value in results.items()
            if name.endswith("_test_accuracy")
        }

    @contextmanager
    def _session(self) -> Iterator[None]:
        """SAEBench's function on the world's texts: quiet, seeded by it, and without a trace."""
        texts, devices = self.world.probe_texts, range(torch.cuda.device_count())
        with ExitStack() as stack:
            if texts is not None:
                served = (dict(texts["train"]), dict(texts["test"]))
                classes = {self.world.name: list(texts["train"])}
                stack.enter_context(patch.dict(dataset_info.chosen_classes_per_dataset, classes))
                stack.enter_context(
                    patch.object(
                        dataset_utils,
                        "get_multi_label_train_test_data",
                        lambda *_args, **_options: (
                            {name: list(rows) for name, rows in served[0].items()},
                            {name: list(rows) for name, rows in served[1].items()},
                        ),
                    )
                )
            # Checked shapes of an inner function collide with those of the outer one there.
            stack.callback(jaxtyping.config.update, "jaxtyping_disable", _checks_are_off())
            jaxtyping.config.update("jaxtyping_disable", True)
            for module in (activation_collection, dataset_utils):
                stack.enter_context(patch.object(module, "tqdm", _no_progress_bar))
            stack.enter_context(torch.set_grad_enabled(torch.is_grad_enabled()))
            stack.enter_context(torch.random.fork_rng(devices))
            stack.enter_context(redirect_stdout(io.StringIO()))
            yield


def _checks_are_off() -> bool:
    return bool(jaxtyping.config.jaxtyping_disable)


def _no_progress_bar(iterable: Any, **_: Any) -> Any:
    return iterable
