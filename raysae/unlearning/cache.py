"""Everything of an evaluation that depends on the model only, as plain arrays.

Built once per search, read by every worker: question ids, prompts, right answers, the model's
answers without an intervention, and the residual stream at the hook, of every known prompt and of
SAEBench's two corpora. Each SAE is then scored without running the layers below the hook.

The residual stream is kept in the batches in which SAEBench encodes it, and encoded in even pieces
of them, on a GPU in these batches. A matrix product may round a row differently in a batch of few
rows, and a GPU's in a batch of any other size, where the k largest of equals may be others too: a
feature that barely fires would then be counted by one evaluator and not by the other.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from sae_bench.evals.unlearning.eval_config import UnlearningEvalConfig
from sae_bench.evals.unlearning.utils import feature_activation, metrics
from sae_bench.sae_bench_utils.activation_collection import get_bos_pad_eos_mask
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformer_lens import HookedTransformer

from raysae.unlearning.known import known_question_ids
from raysae.unlearning.memory import batches_fit
from raysae.unlearning.protocol import saebench_session
from raysae.unlearning.result import MIN_KNOWN_QUESTIONS, too_few_known
from raysae.worlds.prompts import ANSWERS
from raysae.worlds.world import World, check_hook

_PARTS = ("forget", "retain", "prompts")

Progress = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Corpus:
    """One of SAEBench's two sparsity corpora at the hook."""

    resid: np.ndarray
    """(sequences, seq_len, d_model)."""
    counts: np.ndarray
    """bool (sequences, seq_len); False at BOS, PAD and EOS, which sparsity leaves out."""


@dataclass(frozen=True, eq=False)
class Prompts:
    """The known questions of all data sets, one after the other, as SAEBench asks them."""

    datasets: tuple[str, ...]
    offsets: tuple[int, ...]
    """(data sets + 1,) data set i owns the prompts offsets[i] to offsets[i + 1]."""
    ids: np.ndarray
    """(prompts,) position in the data set's questions."""
    tokens: np.ndarray
    """(prompts, longest) right-padded."""
    lengths: np.ndarray
    """(prompts,) tokens without padding; the answer is read at lengths - 1."""
    answers: np.ndarray
    """(prompts,) right letter, 0 to 3."""
    baseline: np.ndarray
    """(prompts,) the model's letter without an intervention."""
    resid: np.ndarray
    """(prompts, longest, d_model) at the hook; zeros beyond the batch's own padding."""
    batches: np.ndarray
    """(batches, 3) first prompt, one past the last, padded length: SAEBench's batches."""

    def rows(self, dataset: str) -> slice:
        """The prompts of one data set."""
        i = self.datasets.index(dataset)
        return slice(self.offsets[i], self.offsets[i + 1])


@dataclass(frozen=True, eq=False)
class EvaluationCache:
    """What every SAE of one world, model and hook shares; numpy arrays and plain types.

    Arrays may be read-only, as an object store hands them out: readers never write into them.
    bfloat16 arrays are stored as their int16 bits, numpy having no such type; see `as_tensor`.
    """

    hook_name: str
    dtype: str
    """Of the residual stream, torch's name."""
    config: dict[str, Any]
    """Of the `UnlearningEvalConfig` it was built for."""
    forget: Corpus
    retain: Corpus
    prompts: Prompts
    answer_tokens: tuple[int, ...]
    """Token ids of `ANSWERS`."""

    @property
    def known_questions(self) -> dict[str, int]:
        """Known questions by data set."""
        bounds = zip(self.prompts.offsets, self.prompts.offsets[1:], strict=False)
        return {
            name: stop - start
            for name, (start, stop) in zip(self.prompts.datasets, bounds, strict=True)
        }

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        parts = (self.forget, self.retain, self.prompts)
        values = [value for part in parts for value in vars(part).values()]
        return sum(value.nbytes for value in values if isinstance(value, np.ndarray))

    def to_plain(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Arrays by name, and the rest as JSON knows it: to be kept without pickle."""
        arrays: dict[str, np.ndarray] = {}
        facts: dict[str, Any] = {}
        for owner, part in (("", self), *((name, getattr(self, name)) for name in _PARTS)):
            for name, value in vars(part).items():
                if isinstance(value, np.ndarray):
                    arrays[f"{owner}.{name}"] = value
                elif name not in _PARTS:
                    facts[f"{owner}.{name}"] = value
        return arrays, facts

    @classmethod
    def from_plain(
        cls, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]
    ) -> EvaluationCache:
        """What `to_plain` was called on; the arrays are not copied."""
        fields: dict[str, dict[str, Any]] = {owner: {} for owner in ("", *_PARTS)}
        for key, value in {**arrays, **facts}.items():
            owner, name = key.split(".")
            fields[owner][name] = value
        for owner, name in (("", "answer_tokens"), ("prompts", "datasets"), ("prompts", "offsets")):
            fields[owner][name] = tuple(fields[owner][name])  # JSON has lists only
        return cls(
            **fields[""],
            forget=Corpus(**fields["forget"]),
            retain=Corpus(**fields["retain"]),
            prompts=Prompts(**fields["prompts"]),
        )

    def is_right(self, letters: np.ndarray) -> dict[str, np.ndarray]:
        """Letters (..., prompts) → by data set, bool (..., questions)."""
        right = letters == self.prompts.answers
        return {name: right[..., self.prompts.rows(name)] for name in self.prompts.datasets}


def build_cache(
    world: World,
    model: HookedTransformer,
    hook_name: str,
    config: UnlearningEvalConfig,
    progress: Progress | None = None,
    *,
    min_known: int = MIN_KNOWN_QUESTIONS,
) -> EvaluationCache:
    """Run the model once over the known prompts and SAEBench's two corpora.

    Args:
        world: questions and corpora.
        model: the world's, in TransformerLens.
        hook_name: ``blocks.L.hook_resid_post``.
        config: see `default_eval_config`.
        progress: called with one line before each part.
        min_known: known questions needed of the forget set and of the retain sets together.

    Takes 4 · d_model bytes (float32) for each token of `dataset_size` sequences of either corpus.
    Raises ValueError for a hook that the model lacks, when the model knows too few questions, and
    when its tokenizer splits an answer letter; UserError where a GPU has no memory for a batch.
    """
    say = progress or _silent
    layer = check_hook(model, hook_name)
    say("finding the questions the model knows")
    ids = known_question_ids(world, model, config)
    complaint = too_few_known({name: len(known) for name, known in ids.items()}, min_known)
    if complaint:
        raise ValueError(complaint)
    with (
        saebench_session(world, model, config.random_seed),
        batches_fit(config, model.cfg.d_vocab),
    ):
        forget_tokens, retain_tokens = feature_activation.get_shuffled_forget_retain_tokens(
            model, batch_size=config.dataset_size, seq_len=config.seq_len
        )
        say(f"running {len(forget_tokens)} forget and {len(retain_tokens)} retain sequences")
        forget, retain = (
            _run_corpus(model, tokens, layer, hook_name, config.llm_batch_size)
            for tokens in (forget_tokens, retain_tokens)
        )
        say(f"asking {sum(map(len, ids.values()))} known questions")
        prompts = _run_prompts(world, model, hook_name, config, ids)
        answer_tokens = model.to_tokens(list(ANSWERS), prepend_bos=False)
    if answer_tokens.shape != (len(ANSWERS), 1):
        raise ValueError(
            f"SAEBench needs each of the answers {ANSWERS} to be one token; this tokenizer makes "
            f"{answer_tokens.tolist()} of them"
        )
    return EvaluationCache(
        hook_name=hook_name,
        dtype=str(model.cfg.dtype).removeprefix("torch."),
        config=asdict(config),
        forget=forget,
        retain=retain,
        prompts=prompts,
        answer_tokens=tuple(answer_tokens.flatten().tolist()),
    )


def as_array(tensor: Tensor) -> np.ndarray:
    """A tensor as a numpy array; bfloat16 as its bits in int16."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.int16)
    array: np.ndarray = tensor.numpy()
    return array


def as_tensor(array: np.ndarray, dtype: str, device: str) -> Tensor:
    """A fresh tensor with the values of a piece of a cached array; the array stays untouched."""
    shared = shared_tensor(array, dtype, device)
    return shared.clone(memory_format=torch.contiguous_format) if shared.is_cpu else shared


def shared_tensor(array: np.ndarray, dtype: str, device: str) -> Tensor:
    """As `as_tensor`, but on a CPU the array's own memory: never to be written into."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writ")
        tensor = torch.from_numpy(array)
    if dtype == "bfloat16" and tensor.dtype == torch.int16:
        tensor = tensor.view(torch.bfloat16)
    return tensor.to(device)


def _silent(line: str) -> None:
    del line


def _run_corpus(
    model: HookedTransformer, tokens: Tensor, layer: int, hook_name: str, batch_size: int
) -> Corpus:
    parts: list[np.ndarray] = []
    for start in range(0, len(tokens), batch_size):
        # The call SAEBench makes in get_feature_activation_sparsity.
        _, cache = model.run_with_cache(
            tokens[start : start + batch_size], stop_at_layer=layer + 1, names_filter=hook_name
        )
        parts.append(as_array(cache[hook_name]))
    mask = as_array(get_bos_pad_eos_mask(tokens, model.tokenizer))
    return Corpus(resid=np.concatenate(parts), counts=mask)


def _run_prompts(
    world: World,
    model: HookedTransformer,
    hook_name: str,
    config: UnlearningEvalConfig,
    ids: dict[str, np.ndarray],
) -> Prompts:
    """Ask every known question by SAEBench's own `get_output_probs_abcd`, listening at the hook."""
    resid: list[Tensor] = []
    tokens: list[Tensor] = []
    baseline: list[Tensor] = []
    batches, offsets, lengths, answers = [], [0], [], []

    def listen(activation: Tensor, hook: Any) -> None:  # noqa: ARG001, TransformerLens' signature
        resid.append(activation.cpu())  # a GPU's memory is needed for the logits

    for name, known in ids.items():
        prompts = [world.ask(name, i) for i in known]
        size = min(len(prompts), config.llm_batch_size * 2)
        starts = range(0, len(prompts), size)
        with model.hooks(fwd_hooks=[(hook_name, listen)]):
            probs = metrics.get_output_probs_abcd(
                model, prompts, batch_size=size, n_batches=len(starts), verbose=False
            )
        baseline.append(probs.argmax(dim=1))
        answers += [world.questions[name][i].answer for i in known]
        for start in starts:
            batch = prompts[start : start + size]
            tokens.append(model.to_tokens(batch, padding_side="right", prepend_bos=False))
            lengths += [model.to_tokens(p, prepend_bos=False).shape[1] for p in batch]
            first = offsets[-1] + start
            batches.append((first, first + len(batch), tokens[-1].shape[1]))
        offsets.append(offsets[-1] + len(prompts))

    longest = max(length for _, _, length in batches)
    pad = model.tokenizer.pad_token_id  # type: ignore[union-attr]
    tokens = [F.pad(t, (0, longest - t.shape[1]), value=pad) for t in tokens]
    resid = [F.pad(r, (0, 0, 0, longest - r.shape[1])) for r in resid]
    return Prompts(
        datasets=tuple(ids),
        offsets=tuple(offsets),
        ids=np.concatenate(list(ids.values())),
        tokens=as_array(torch.cat(tokens)),
        lengths=np.array(lengths),
        answers=np.array(answers),
        baseline=as_array(torch.cat(baseline)),
        resid=as_array(torch.cat(resid)),
        batches=np.array(batches),
    )
