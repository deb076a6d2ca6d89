"""SAEBench's unlearning protocol as both evaluators use it: configuration, seeds, questions, SAE.

SAEBench reads its questions and corpora from the hub through module globals, leaves gradients
switched off, takes the shuffle of the corpora from the global random state and stores attributes in
the SAE's configuration. `saebench_session` serves a world's own data instead and puts everything
back; `saebench_view` leaves the caller's SAE as it was.
"""

from __future__ import annotations

import copy
import io
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from sae_bench.evals.unlearning.eval_config import UnlearningEvalConfig
from sae_bench.evals.unlearning.utils import feature_activation, metrics
from sae_bench.sae_bench_utils import activation_collection, general_utils
from sae_lens.saes.sae import SAEMetadata, TrainingSAE
from transformer_lens import HookedTransformer

from raysae.worlds.prompts import GEMMA_2
from raysae.worlds.world import FORGET_SET, World

SAEBENCH_SUBJECT = "biology"
"""SAEBench's own header asks about it, whatever the world forgets."""
SAEBENCH_MODELS = ("gemma-2-2b-it", "gemma-2-9b-it")
"""The names by which SAEBench knows how to ask."""

KNOWN_KIND = "correct"
"""SAEBench's kind of question ids: right under all 24 permutations. Its interventions are scored
on this kind whatever ``target_metric`` says."""


def default_eval_config(world: World, **changes: Any) -> UnlearningEvalConfig:
    """SAEBench's own configuration with its own defaults, fitted to a world.

    Only what SAEBench asks its user for is set: the model's name, the names of the data sets, the
    length of the world's sequences, the model's batch size and type. `changes` override any field
    of `UnlearningEvalConfig`; a changed grid is no longer SAEBench's score.
    """
    fields: dict[str, Any] = {
        "model_name": world.saebench_model_name,
        "dataset_names": [FORGET_SET, *(name for name in world.questions if name != FORGET_SET)],
        "seq_len": world.seq_len,
        "llm_batch_size": world.llm_batch_size,
        "llm_dtype": world.dtype,
    }
    return UnlearningEvalConfig(**(fields | changes))


@contextmanager
def saebench_session(world: World, model: HookedTransformer, seed: int) -> Iterator[None]:
    """Run SAEBench's functions on a world's data, quietly, seeded and without a trace.

    Inside: `load_dataset` and `get_forget_retain_data` serve `world`, the model carries the name
    SAEBench chooses prompts by, the three random generators are seeded with `seed`, standard
    output and progress bars are silenced. Outside: all of it is as before, the generators' states
    and torch's grad mode included. Patches module globals, hence one session per process at a time.
    """

    asked: list[str] = []  # the data set that SAEBench is at

    def load_dataset(_path: str, name: str, **_: Any) -> list[dict[str, Any]]:
        asked[:] = [name]
        return [
            {"question": q.question, "choices": list(q.choices), "answer": q.answer}
            for q in world.questions[name]
        ]

    def get_forget_retain_data(
        *_names: str, min_len: int = 50, **_: Any
    ) -> tuple[list[str], list[str]]:
        # SAEBench drops texts of 50 characters or fewer; so does this stand-in.
        forget = [text for text in world.forget_texts if len(text) > min_len]
        retain = [text for text in world.retain_texts if len(text) > min_len]
        return forget, retain

    def prompt(
        question: str,
        choices: Sequence[str],
        *_: Any,
        permute_choices: Sequence[int] = (0, 1, 2, 3),
        without_question: bool = False,
        **__: Any,
    ) -> str:
        subject, listed = world.subject(asked[0]), [choices[i] for i in permute_choices]
        return world.prompt.ask(subject, question, listed, without_question=without_question)

    with ExitStack() as stack:
        if world.prompt != GEMMA_2 or world.forget_subject != SAEBENCH_SUBJECT:
            stack.enter_context(patch.object(metrics, "convert_wmdp_data_to_prompt", prompt))
        for module, name, value in (
            (metrics, "load_dataset", load_dataset),
            (feature_activation, "get_forget_retain_data", get_forget_retain_data),
            (metrics, "tqdm", _no_progress_bar),
            (activation_collection, "tqdm", _no_progress_bar),
            (model.cfg, "model_name", _name_for_saebench(world)),
        ):
            stack.enter_context(patch.object(module, name, value))
        stack.enter_context(torch.no_grad())  # restores the caller's mode on the way out
        stack.enter_context(redirect_stdout(io.StringIO()))
        stack.enter_context(_seeded(seed))
        yield


def saebench_view(sae: Any, world: World, hook_name: str, dtype: torch.dtype, device: str) -> Any:
    """The same SAE with the configuration attributes SAEBench reads, the caller's one untouched.

    SAELens 6 keeps ``hook_name`` in ``cfg.metadata`` and has no ``hook_layer``; SAEBench's own
    `load_and_format_sae` adds both to the configuration, here to a copy. Weights are shared unless
    `dtype` or `device` differ.

    Raises ValueError for an SAE that cannot be scored: one that is still in training form, whose
    decoder rows are not of norm 1, whose activations are normalised at run time, or which belongs
    to another width, model or hook.
    """
    if isinstance(sae, TrainingSAE):
        raise ValueError(
            f"{type(sae).__name__} is a training SAE; SAEBench scores inference SAEs in raw "
            "activation units: convert it first"
        )
    check_sae(sae, world, hook_name)
    normalisation = getattr(sae.cfg, "normalize_activations", "none")
    if normalisation != "none":
        raise ValueError(
            f"the SAE has normalize_activations={normalisation!r}; SAEBench's multipliers are in "
            "raw activation units: fold the normalisation into the weights and set it to 'none'"
        )
    _check_decoder_norms(sae.W_dec.data)
    view = copy.copy(sae)
    if sae.W_dec.dtype != dtype or sae.W_dec.device.type != torch.device(device).type:
        view = copy.deepcopy(sae).to(device=torch.device(device), dtype=dtype)
    view.cfg = copy.deepcopy(sae.cfg)
    _fill_metadata(view.cfg, world.sae_model_name, hook_name)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        general_utils.load_and_format_sae("sae", view, device)
    if view.cfg.hook_name != hook_name:
        raise ValueError(
            f"the SAE was made for the hook {view.cfg.hook_name!r}, the evaluation is at "
            f"{hook_name!r}"
        )
    return view


def check_sae(sae: Any, world: World, hook_name: str) -> None:
    """Raise ValueError for an SAE that was not made for that model and hook; cheap.

    Width, model and layer as far as the SAE's metadata says; `saebench_view` checks the rest.
    """
    if sae.cfg.d_in != world.d_model:
        raise ValueError(
            f"the SAE has d_in {sae.cfg.d_in}, the residual stream of the world {world.name!r} has "
            f"{world.d_model} dimensions: the SAE belongs to another model"
        )
    metadata = getattr(sae.cfg, "metadata", None)
    models = (world.sae_model_name, world.saebench_model_name)
    for kind, expected in (("model_name", models), ("hook_name", (hook_name,))):
        found = getattr(metadata, kind, None)
        if found and found not in expected:
            raise ValueError(
                f"the SAE was made for {kind} {found!r}, the evaluation is for {expected[0]!r}"
            )


def sae_cfg_dict(sae: Any, world: World, hook_name: str) -> dict[str, Any]:
    """The SAE's configuration as SAEBench writes it into its result file."""
    view = saebench_view(sae, world, hook_name, sae.W_dec.dtype, str(sae.W_dec.device))
    config: dict[str, Any] = view.cfg.to_dict()
    return config


def write_question_ids(folder: Path, ids: Mapping[str, np.ndarray]) -> None:
    """Write SAEBench's files of question ids below its artifacts folder.

    SAEBench recomputes all of a data set's files if one of the nine is missing. Only the one of
    split ``all`` and kind ``correct`` is read; the others are filled with the same ids.
    """
    for name, known in ids.items():
        for split in ("all", "train", "test"):
            for kind in ("correct", "correct-iff-question", "correct-no-tricks"):
                path = _ids_file(str(folder), split, name, kind)
                path.parent.mkdir(parents=True, exist_ok=True)
                np.savetxt(path, known, fmt="%d")


def sparsity_through_text(sparsity: np.ndarray) -> np.ndarray:
    """float32 (d_sae,) → float64 (d_sae,) with the six decimals SAEBench's text file keeps.

    They decide ties in the order of features and comparisons with the retain threshold.
    """
    text = io.StringIO()
    np.savetxt(text, sparsity, fmt="%f")
    text.seek(0)
    return np.loadtxt(text, dtype=float, ndmin=1)


def dataset_file_name(name: str) -> str:
    """SAEBench's spelling of a data set in file names."""
    return name if name == FORGET_SET else f"mmlu-{name.replace('_', '-')}"


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices: Sequence[int] = range(torch.cuda.device_count())
    try:
        with torch.random.fork_rng(devices):
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _name_for_saebench(world: World) -> str:
    """A name SAEBench asks by; the prompts of other models are served to it."""
    known = world.saebench_model_name in SAEBENCH_MODELS
    return world.saebench_model_name if known else SAEBENCH_MODELS[0]


def _no_progress_bar(iterable: Any, **_: Any) -> Any:
    return iterable


def _ids_file(folder: str, split: str, name: str, kind: str = KNOWN_KIND) -> Path:
    file_name = f"{dataset_file_name(name)}_{kind}.csv"
    return Path(folder) / "data" / "question_ids" / split / file_name


def _check_decoder_norms(W_dec: torch.Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if general_utils.check_decoder_norms(W_dec):
            return
    norms = W_dec.norm(dim=1)
    raise ValueError(
        f"decoder rows must have norm 1; found norms from {norms.min().item():.6g} to "
        f"{norms.max().item():.6g}: fold them into the encoder first (fold_W_dec_norm)"
    )


def _fill_metadata(cfg: Any, model_name: str, hook_name: str) -> None:
    """Name the model and the hook where the SAE's configuration leaves them out."""
    if not hasattr(cfg, "metadata"):
        if not hasattr(cfg, "hook_name"):
            cfg.metadata = SAEMetadata(model_name=model_name, hook_name=hook_name)
        return
    if not cfg.metadata.model_name:
        cfg.metadata.model_name = model_name
    if not cfg.metadata.hook_name:
        cfg.metadata.hook_name = hook_name
