"""The fast evaluator: SAEBench's score with the SAE-independent work done beforehand.

Same questions, grid, features, interventions and answers as SAEBench; what it leaves out cannot
change an answer:

- the layers up to the hook (`EvaluationCache`),
- prompts in which no chosen feature fires: they keep their baseline answer,
- in the last layer all positions but the answering one (`LayersAfter`),
- repetitions: two feature sets of which the same features fire in a prompt are one intervention on
  that prompt; and two interventions, on one prompt or on two that begin alike, are one up to the
  position at which they part (positions before the first firing are a case of that),
- all columns of the unembedding but the answers'.

Sums are taken in another order than in SAEBench, which rounds in the last digits of float32; an
answer could differ only where two letters' logits agree to about six digits. In bfloat16 that is
two to three digits, and SAEBench rounds the residual stream once more on its way through the SAE's
reconstruction: features and sparsities are still equal, but a few answers of a thousand differ,
where the two best letters are within the rounding, about a dozen units of bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from sae_bench.evals.unlearning.eval_config import UnlearningEvalConfig
from sae_bench.sae_bench_utils.general_utils import str_to_dtype
from torch import Tensor
from transformer_lens import HookedTransformer

from raysae.unlearning.cache import Corpus, EvaluationCache, as_tensor
from raysae.unlearning.gemma_layers import layers_after
from raysae.unlearning.grid import choose_features, eligible_features
from raysae.unlearning.layers_after import Past, select
from raysae.unlearning.protocol import saebench_view, sparsity_through_text
from raysae.unlearning.result import (
    MIN_KNOWN_QUESTIONS,
    UNTRAINED_CAUSE,
    UnlearningResult,
    UnlearningStatus,
    make_result,
    refused,
    too_few_known,
)
from raysae.unlearning.scoring import unlearning_score
from raysae.worlds.world import World, hook_layer

TOKENS_PER_BATCH = 8192
"""Rows times positions planned at once; about half of them remain after sharing."""

CUT_EVERY = 8
"""Positions after which rows that are still in the same state are looked for."""

WORTH_SHARING = 0.9
"""Rows are no longer cut into pieces once more than this share of them is in a state of its own."""


class CachedEvaluator:
    """Scores SAEs like `SAEBenchEvaluator`, several times faster; holds no state between SAEs."""

    name = "cached"

    def __init__(
        self,
        world: World,
        model: HookedTransformer,
        cache: EvaluationCache,
        config: UnlearningEvalConfig,
        *,
        min_known: int = MIN_KNOWN_QUESTIONS,
    ) -> None:
        """Check that the cache belongs to this model and configuration.

        Raises ValueError when the cache was built for another world or configuration, and when
        the model's layers after the hook do not give the cached baseline answers.
        """
        self.world, self.model, self.cache, self.config = world, model, cache, config
        self.device = str(model.cfg.device)
        if cache.world_name != world.name or cache.config != asdict(config):
            raise ValueError(
                f"the cache was built for the world {cache.world_name!r} with {cache.config}; "
                f"asked for {world.name!r} with {asdict(config)}"
            )
        self.layers = layers_after(model, hook_layer(cache.hook_name), cache.answer_tokens)
        self._too_few = too_few_known(cache.known_questions, min_known)
        self._check_baseline()

    @torch.no_grad()
    def evaluate(self, sae: Any, *, training_steps: int) -> UnlearningResult:
        """Score one inference SAE in raw activation units with unit-norm decoder rows.

        Raises ValueError for an SAE that cannot be scored, see `saebench_view`. An SAE of zero
        `training_steps` is refused with the status `untrained`, not evaluated.
        """
        if training_steps == 0:
            return refused(self.name, UnlearningStatus.untrained, UNTRAINED_CAUSE)
        if self._too_few:
            return refused(self.name, UnlearningStatus.too_few_known_questions, self._too_few)
        dtype = str_to_dtype(self.config.llm_dtype)
        view = saebench_view(sae, self.world, self.cache.hook_name, dtype, self.device)
        forget_sparsity = self._sparsity(view, self.cache.forget)
        retain_sparsity = self._sparsity(view, self.cache.retain)
        grid = choose_features(forget_sparsity, retain_sparsity, self.config)
        answers = self._answers(view, [(point.features, point.multiplier) for point in grid])
        is_correct = self.cache.is_right(answers)
        return make_result(
            evaluator=self.name,
            score=unlearning_score(is_correct),
            grid=grid,
            is_correct=is_correct,
            baseline=self.cache.is_right(self.cache.prompts.baseline),
            forget_sparsity=forget_sparsity,
            retain_sparsity=retain_sparsity,
            eligible=eligible_features(forget_sparsity, retain_sparsity, self.config),
        )

    def _sparsity(self, sae: Any, corpus: Corpus) -> np.ndarray:
        """(d_sae,) share of the counted tokens on which each feature fires, as SAEBench reads it.

        In SAEBench's batches, see `raysae.unlearning.cache`.
        """
        counts = torch.zeros(sae.W_dec.shape[0], dtype=torch.float32, device=self.device)
        for start in range(0, len(corpus.resid), self.config.llm_batch_size):
            batch = slice(start, start + self.config.llm_batch_size)
            acts = sae.encode(as_tensor(corpus.resid[batch], self.cache.dtype, self.device))
            counted = as_tensor(corpus.counts[batch], "bool", self.device).flatten().float()
            # Sums of ones: exact in float32 up to 2^24 tokens, in whatever order.
            counts += counted @ (acts > 0).flatten(0, 1).float()
        sparsity = counts / int(corpus.counts.sum())
        return sparsity_through_text(sparsity.cpu().numpy())

    def _activations(self, sae: Any, features: Tensor) -> Tensor:
        """(prompts, longest, features) of all prompts; position 0 and padding are zero."""
        prompts = self.cache.prompts
        n, longest = prompts.tokens.shape
        chosen = torch.zeros(n, longest, len(features), dtype=sae.W_dec.dtype, device=self.device)
        for first, end, length in prompts.batches.tolist():
            resid = as_tensor(prompts.resid[first:end, :length], self.cache.dtype, self.device)
            chosen[first:end, :length] = sae.encode(resid)[:, :, features]
        chosen[:, 0] = 0  # SAEBench leaves the BOS position alone
        lengths = as_tensor(prompts.lengths, "int64", self.device)
        beyond = torch.arange(longest, device=self.device) >= lengths[:, None]
        chosen[beyond] = 0
        return chosen

    def _answers(self, sae: Any, grid: list[tuple[tuple[int, ...], int]]) -> np.ndarray:
        """Letters, int64 (len(grid), prompts), after each intervention (features, multiplier)."""
        letters = np.repeat(self.cache.prompts.baseline[None], len(grid), axis=0)
        union = sorted({feature for features, _ in grid for feature in features})
        if not union:
            return letters
        features = torch.tensor(union, device=self.device)
        acts = self._activations(sae, features)
        directions = sae.W_dec[features]
        member = np.array([[f in chosen for f in union] for chosen, _ in grid])
        fires = (acts > 0).any(dim=1).cpu().numpy()
        multipliers = [m for _, m in grid]
        prompts = self.cache.prompts
        for batch in _plan(fires, member, multipliers, prompts.tokens, prompts.lengths):
            self._run(batch, acts, directions, multipliers, letters)
        return letters

    def _run(
        self,
        batch: Batch,
        acts: Tensor,
        directions: Tensor,
        multipliers: list[int],
        letters: np.ndarray,
    ) -> None:
        """Answer one batch of interventions and write the letters of the grid rows they stand for.

        Position by position a row is a state: the tokens so far, the features that fired so far
        and their multiplier. Rows in the same state are computed once, up to the cut at which they
        part.
        """
        prompts = self.cache.prompts
        resid = as_tensor(prompts.resid[batch.prompts], self.cache.dtype, self.device)
        acts = acts[batch.prompts]
        owner = np.array([v.owner for v in batch.variants])
        pattern = np.stack([v.pattern for v in batch.variants])
        multiplier = np.array([multipliers[v.grid_rows[0]] for v in batch.variants])
        tokens, fires = prompts.tokens[batch.prompts], (acts > 0).cpu().numpy()
        past: Past = []
        state = np.zeros(len(owner), dtype=np.int64)
        start = 0
        while start < batch.length:
            end = min(start + CUT_EVERY, batch.length)
            rows, following = _distinct(tokens, fires, owner, pattern, multiplier, end)
            if len(rows) > WORTH_SHARING * len(owner):
                end = batch.length
            if end == batch.length:
                rows = np.arange(len(owner))
            here = torch.from_numpy(owner[rows]).to(self.device)
            z = acts[here, start:end]
            on = (z > 0) & torch.from_numpy(pattern[rows]).to(self.device)[:, None]
            target = -torch.from_numpy(multiplier[rows]).to(z)[:, None, None]
            changed = resid[here, start:end] + torch.where(on, target - z, 0.0) @ directions
            past = select(past, torch.from_numpy(state[rows]).to(self.device))
            if end < batch.length:
                past = self.layers.extend(changed, past)
            state, start = following, end
        found = self.layers.letters(changed, past).cpu().numpy()
        for variant, letter in zip(batch.variants, found, strict=True):
            letters[variant.grid_rows, batch.prompts[variant.owner]] = letter

    @torch.no_grad()
    def _check_baseline(self) -> None:
        """Raise ValueError unless the layers after the hook reproduce some cached answers."""
        prompts = self.cache.prompts
        if not len(prompts.lengths):
            return
        same = np.flatnonzero(prompts.lengths == prompts.lengths[0])[:32]
        resid = as_tensor(prompts.resid[same, : prompts.lengths[0]], self.cache.dtype, self.device)
        past = self.layers.extend(resid[:, :2], [])
        found = self.layers.letters(resid[:, 2:], past).cpu().numpy()
        agree = int((found == prompts.baseline[same]).sum())
        if agree < 0.9 * len(same):
            raise ValueError(
                f"the layers after {self.cache.hook_name} answer {agree} of {len(same)} prompts as "
                "cached: the cache belongs to another model, or its layers depend on more than the "
                "residual stream"
            )


@dataclass(frozen=True)
class Variant:
    """One distinct intervention on one prompt."""

    owner: int
    """Position of the prompt in its batch."""
    pattern: np.ndarray
    """bool (features,): the chosen features that fire somewhere in the prompt."""
    grid_rows: list[int]
    """The grid's interventions that amount to this one; all with the same multiplier."""


@dataclass(frozen=True)
class Batch:
    """Prompts of one length with all their interventions."""

    prompts: np.ndarray
    length: int
    variants: list[Variant]


def _plan(
    fires: np.ndarray,
    member: np.ndarray,
    multipliers: list[int],
    tokens: np.ndarray,
    lengths: np.ndarray,
) -> Iterator[Batch]:
    """Every intervention that can change an answer, once, in batches of prompts of one length.

    Args:
        fires: bool (prompts, features), the feature fires somewhere in the prompt.
        member: bool (grid rows, features), the feature is chosen in that intervention.
        multipliers: (grid rows,).
        tokens: (prompts, longest); neighbours in their order share the most work.
        lengths: (prompts,).
    """
    hit = np.flatnonzero((fires[:, None] & member).any(axis=(1, 2)))
    order = sorted(hit.tolist(), key=lambda p: (lengths[p], tokens[p].tolist()))
    prompts: list[int] = []
    variants: list[Variant] = []
    for prompt, following in zip_longest(order, order[1:]):
        patterns: dict[tuple[bytes, int], Variant] = {}
        for row, pattern in enumerate(fires[prompt] & member):
            if pattern.any():
                key = (pattern.tobytes(), multipliers[row])
                patterns.setdefault(key, Variant(len(prompts), pattern, [])).grid_rows.append(row)
        prompts.append(prompt)
        variants += patterns.values()
        length = int(lengths[prompt])
        full = len(variants) * length >= TOKENS_PER_BATCH
        if full or following is None or lengths[following] != length:
            yield Batch(np.array(prompts), length, variants)
            prompts, variants = [], []


def _distinct(
    tokens: np.ndarray,
    fires: np.ndarray,
    owner: np.ndarray,
    pattern: np.ndarray,
    multiplier: np.ndarray,
    end: int,
) -> tuple[np.ndarray, np.ndarray]:
    """One row of each state at position `end`, and every row's state.

    Args:
        tokens: (prompts, longest).
        fires: bool (prompts, longest, features).
        owner: (rows,) prompt of each row.
        pattern: bool (rows, features), features the row clamps.
        multiplier: (rows,).
        end: positions that count, from 0.
    """
    clamped = fires[:, :end].any(axis=1)[owner] & pattern
    strength = np.where(clamped.any(axis=1), multiplier, 0)
    prefixes = [row.tobytes() for row in tokens[:, :end]]
    states: dict[tuple[bytes, bytes, int], int] = {}
    rows: list[int] = []
    state = np.empty(len(owner), dtype=np.int64)
    for i, (prompt, factor) in enumerate(zip(owner.tolist(), strength.tolist(), strict=True)):
        key = (prefixes[prompt], clamped[i].tobytes(), factor)
        if key not in states:
            states[key] = len(rows)
            rows.append(i)
        state[i] = states[key]
    return np.array(rows), state
