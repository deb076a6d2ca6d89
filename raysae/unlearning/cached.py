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

On a GPU answers are read when all of them have been asked for: it seldom waits for the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from sae_bench.evals.unlearning.eval_config import UnlearningEvalConfig
from sae_bench.sae_bench_utils.general_utils import str_to_dtype
from torch import Tensor
from transformer_lens import HookedTransformer

from raysae.products import matmul
from raysae.unlearning import compiled
from raysae.unlearning.cache import Corpus, EvaluationCache, as_tensor, shared_tensor
from raysae.unlearning.firing import activations_of, count_firing
from raysae.unlearning.gemma_layers import layers_after
from raysae.unlearning.grid import GridPoint, choose_features, eligible_features
from raysae.unlearning.interventions import Interventions, Level, few_sizes, find_interventions
from raysae.unlearning.layers_after import Past
from raysae.unlearning.protocol import saebench_view, sparsity_through_text
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
from raysae.unlearning.scoring import unlearning_score
from raysae.worlds.world import World, check_hook

Questions = Mapping[str, np.ndarray]
"""By data set, bool (known questions,)."""

POSITIONS_AT_ONCE, POSITIONS_AT_ONCE_ON_GPU = 1024, 16384
"""Rows times positions run at once: what a processor's cache holds; what keeps a GPU busy."""
POSITIONS_HELD_ON_GPU = 4 * POSITIONS_AT_ONCE_ON_GPU
"""Rows times positions of which one level of a tree holds keys and values: for the layers behind
gemma-2-2b's twelfth 3.5 GB, less than the logits of one of SAEBench's batches."""
SAES_AT_ONCE, SAES_AT_ONCE_ON_GPU = 4, 16
"""SAEs of which interventions are found together: what they have in common is little, and what each
intervention does at each position takes memory, about 100 MB an SAE of the embedded world."""
ASKING_FOR_A_LAYER = 1.2e10
"""What it costs to ask a GPU for a layer, times d_model², in positions: a millisecond of the host
at 300 Tflop/s and 24 · d_model² operations a position."""
_CHECKED = 32
"""Prompts asked again when an evaluator is made."""


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

        Raises ValueError when the cache was built for another configuration (names aside, which
        decide nothing), and when the model's layers after the hook do not give the cached baseline
        answers.
        """
        self.world, self.model, self.cache, self.config = world, model, cache, config
        self.device = str(model.cfg.device)
        on_cpu = torch.device(self.device).type == "cpu"
        self.positions_at_once = POSITIONS_AT_ONCE if on_cpu else POSITIONS_AT_ONCE_ON_GPU
        self.positions_held = np.inf if on_cpu else POSITIONS_HELD_ON_GPU
        self.encodes_pieces = self.pieces_alike = on_cpu
        self.saes_at_once = SAES_AT_ONCE if on_cpu else SAES_AT_ONCE_ON_GPU
        self.piece_cost = 0.0 if on_cpu else ASKING_FOR_A_LAYER / model.cfg.d_model**2
        built_for, wanted = (
            {name: value for name, value in fields.items() if name != "model_name"}
            for fields in (cache.config, asdict(config))
        )
        if built_for != wanted:
            raise ValueError(f"the cache was built with {built_for}; asked for {wanted}")
        self.layers = layers_after(model, check_hook(model, cache.hook_name), cache.answer_tokens)
        self._too_few = too_few_known(cache.known_questions, min_known)
        self._check_baseline()

    @property
    def known_questions(self) -> dict[str, int]:
        """Known questions by data set."""
        return self.cache.known_questions

    def evaluate(
        self, sae: Any, *, training_steps: int, questions: Questions | None = None
    ) -> UnlearningResult:
        """Score one inference SAE in raw activation units with unit-norm decoder rows.

        Args:
            sae: SAELens' or one of SAEBench's custom ones.
            training_steps: it was trained for. An SAE of none is refused with the status
                `untrained`, not evaluated.
            questions: by data set, bool (known questions,): ask these only. The result is what
                `UnlearningResult.on(questions)` of a full evaluation is; the others are not run.

        Raises ValueError for an SAE that cannot be scored, see `saebench_view`, and for questions
        that are not those of the cache.
        """
        return self.evaluate_many([sae], training_steps=training_steps, questions=questions)[0]

    @torch.no_grad()
    def evaluate_many(
        self, saes: Sequence[Any], *, training_steps: int, questions: Questions | None = None
    ) -> list[UnlearningResult]:
        """Score several SAEs, each as `evaluate` would, in one pass over the cached activations.

        They share the loading of activations, the batches of interventions, and what interventions
        have in common before a feature fires. Memory grows with the activations of the chosen
        features: 4 bytes for each position of each prompt, feature and SAE. Arguments and errors
        as for `evaluate`; one SAE that cannot be scored is an error for all.
        """
        if training_steps == 0:
            untrained = refused(self.name, UnlearningStatus.untrained, UNTRAINED_CAUSE)
            return [untrained for _ in saes]
        if self._too_few:
            status = UnlearningStatus.too_few_known_questions
            return [refused(self.name, status, self._too_few) for _ in saes]
        asked = self._asked(questions)
        dtype = str_to_dtype(self.config.llm_dtype)
        views = [
            saebench_view(sae, self.world, self.cache.hook_name, dtype, self.device) for sae in saes
        ]
        forget = self._sparsities(views, self.cache.forget)
        retain = self._sparsities(views, self.cache.retain)
        grids = [
            choose_features(of_forget, of_retain, self.config)
            for of_forget, of_retain in zip(forget, retain, strict=True)
        ]
        groups = [slice(i, i + self.saes_at_once) for i in range(0, len(saes), self.saes_at_once)]
        letters = [self._letters(views[group], grids[group], asked) for group in groups]
        return [
            self._result(grid, answers, asked, of_forget, of_retain)
            for grid, answers, of_forget, of_retain in zip(
                grids, np.concatenate(letters), forget, retain, strict=True
            )
        ]

    def _asked(self, questions: Questions | None) -> np.ndarray:
        """bool (prompts,): the prompts of these questions."""
        known = self.known_questions
        if questions is None:
            return np.ones(sum(known.values()), dtype=bool)
        check_questions(questions, known)
        return np.concatenate(
            [np.asarray(questions[name], dtype=bool) for name in self.cache.prompts.datasets]
        )

    def _result(
        self,
        grid: tuple[GridPoint, ...],
        letters: np.ndarray,
        asked: np.ndarray,
        forget_sparsity: np.ndarray,
        retain_sparsity: np.ndarray,
    ) -> UnlearningResult:
        prompts = self.cache.prompts
        masks = {name: asked[prompts.rows(name)] for name in prompts.datasets}
        right, baseline = self.cache.is_right(letters), self.cache.is_right(prompts.baseline)
        is_correct = {name: right[name][:, mask] for name, mask in masks.items()}
        return make_result(
            evaluator=self.name,
            score=unlearning_score(is_correct),
            grid=grid,
            is_correct=is_correct,
            baseline={name: baseline[name][mask] for name, mask in masks.items()},
            forget_sparsity=forget_sparsity,
            retain_sparsity=retain_sparsity,
            eligible=eligible_features(forget_sparsity, retain_sparsity, self.config),
            partial=not asked.all(),
        )

    def _sparsities(self, saes: Sequence[Any], corpus: Corpus) -> list[np.ndarray]:
        """Of each SAE, (d_sae,) share of the counted tokens on which each feature fires.

        As SAEBench reads it, and in pieces of its batches, see `raysae.unlearning.cache`.
        """
        counts = [torch.zeros(len(sae.W_dec), device=self.device) for sae in saes]
        n, length = corpus.counts.shape
        size = self.config.llm_batch_size
        starts = range(0, n, size)
        for batch, _ in self._pieces((start, min(start + size, n), length) for start in starts):
            resid = as_tensor(corpus.resid[batch], self.cache.dtype, self.device)
            counted = as_tensor(corpus.counts[batch], "bool", self.device)
            for sae, count in zip(saes, counts, strict=True):
                count += count_firing(sae, resid, counted)
        total = int(corpus.counts.sum())
        return [sparsity_through_text((count / total).cpu().numpy()) for count in counts]

    def _pieces(self, batches: Iterable[tuple[int, int, int]]) -> Iterator[tuple[slice, int]]:
        """Rows (first, end) of padded length, on a CPU in pieces of about `positions_at_once`.

        So that what an encoder makes of a piece is still in the processor's cache when it is read.
        """
        for first, end, length in batches:
            pieces = max(1, round((end - first) * length / self.positions_at_once))
            pieces = pieces if self.encodes_pieces else 1
            bounds = np.linspace(first, end, pieces + 1).astype(int).tolist()
            yield from ((slice(low, high), length) for low, high in pairwise(bounds))

    def _activations(self, saes: Sequence[Any], features: Sequence[Tensor]) -> Tensor:
        """(prompts, longest, features of all SAEs) of all prompts; position 0 and padding are zero.

        Args:
            saes: as below.
            features: int64, of each SAE.
        """
        prompts = self.cache.prompts
        n, longest = prompts.tokens.shape
        bounds = np.cumsum([0, *map(len, features)]).tolist()
        dtype = saes[0].W_dec.dtype
        chosen = torch.zeros(n, longest, bounds[-1], dtype=dtype, device=self.device)
        for batch, length in self._pieces(prompts.batches.tolist()):
            resid = as_tensor(prompts.resid[batch, :length], self.cache.dtype, self.device)
            for i, sae in enumerate(saes):
                here = slice(bounds[i], bounds[i + 1])
                chosen[batch, :length, here] = activations_of(sae, resid, features[i])
        chosen[:, 0] = 0  # SAEBench leaves the BOS position alone
        lengths = as_tensor(prompts.lengths, "int64", self.device)
        beyond = torch.arange(longest, device=self.device) >= lengths[:, None]
        return chosen.masked_fill_(beyond[:, :, None], 0)

    def _letters(
        self, saes: Sequence[Any], grids: Sequence[tuple[GridPoint, ...]], asked: np.ndarray
    ) -> np.ndarray:
        """Letters, int64 (saes, grid rows, prompts), after each intervention."""
        prompts = self.cache.prompts
        multipliers = [point.multiplier for point in grids[0]]
        letters = np.tile(prompts.baseline, (len(saes), len(multipliers), 1))
        unions = [sorted({f for point in grid for f in point.features}) for grid in grids]
        columns = [(i, feature) for i, union in enumerate(unions) for feature in union]
        if not columns:
            return letters
        features = [torch.tensor(u, dtype=torch.int64, device=self.device) for u in unions]
        acts = self._activations(saes, features)
        directions = torch.cat([sae.W_dec[f] for sae, f in zip(saes, features, strict=True)])
        chosen = np.array(
            [
                [[of == i and f in point.features for of, f in columns] for point in grid]
                for i, grid in enumerate(grids)
            ]
        )
        fires = (acts > 0).cpu().numpy()
        resid = shared_tensor(prompts.resid, self.cache.dtype, self.device)
        answers = []
        for group in find_interventions(
            fires, chosen, multipliers, prompts.tokens, prompts.lengths, asked, self.piece_cost
        ):
            levels = group.levels(self.piece_cost)
            run = _Run(self, group, levels, resid, acts, directions)
            answers.append((run, run.letters()))
        for run, of_states in answers:  # read when all are under way
            group = run.group
            intervention, row = np.nonzero(group.grid_rows)
            where = (group.saes[intervention], row, group.prompts[intervention])
            letters[where] = of_states.cpu().numpy()[run.last_state[intervention]]
        return letters

    @torch.no_grad()
    def _check_baseline(self) -> None:
        """Raise ValueError unless the layers after the hook reproduce some cached answers."""
        prompts, dtype = self.cache.prompts, self.cache.dtype
        _, same_length, counts = np.unique(prompts.lengths, return_inverse=True, return_counts=True)
        asked = np.argsort(-counts[same_length], kind="stable")[:_CHECKED]  # of few lengths
        agree = 0
        for length in np.unique(prompts.lengths[asked]).tolist():
            rows = asked[prompts.lengths[asked] == length]
            resid = as_tensor(prompts.resid[rows, :length], dtype, self.device)
            same = torch.arange(len(rows), device=self.device)
            past = self.layers.extend(resid[:, :2], [], same)
            answering = self.layers.answering(resid[:, 2:], past, same)
            found = self.layers.letters(answering).cpu().numpy()
            agree += int((found == prompts.baseline[rows]).sum())
        # A short type rounds more answers over: at chance a quarter agree.
        if agree < (0.9 if dtype == "float32" else 0.75) * len(asked):
            raise ValueError(
                f"the layers after {self.cache.hook_name} answer {agree} of {len(asked)} prompts "
                "as cached: the cache belongs to another model, or its layers depend on more than "
                "the residual stream"
            )


@dataclass(frozen=True)
class _Run:
    """One tree of interventions on its way through the layers, depth first.

    Chunk by chunk, so that what is computed stays in the processor's cache, and only the keys and
    values along one branch are held.
    """

    evaluator: CachedEvaluator
    group: Interventions
    levels: list[Level]
    resid: Tensor
    """(prompts, longest, d_model) at the hook without an intervention; not to be written into."""
    acts: Tensor
    """(prompts, longest, features)."""
    directions: Tensor
    """(features, d_model) decoder rows."""

    @property
    def last_state(self) -> np.ndarray:
        """(interventions,) the state of the last level that each one ends in."""
        interventions = np.arange(len(self.group.prompts))
        state: np.ndarray = np.searchsorted(self.levels[-1].first, interventions, side="right") - 1
        return state

    def letters(self) -> Tensor:
        """int64 (states of the last level,) the answers, on the device."""
        layers, at_once = self.evaluator.layers, self.evaluator.positions_at_once
        states = rows = len(self.levels[-1].first)
        if self.evaluator.pieces_alike:
            rows += few_sizes(states % at_once, at_once) - states % at_once
        found = self.resid.new_zeros(rows, self.resid.shape[-1], device=self.acts.device)
        self._descend(0, (0, len(self.levels[0].first)), [], 0, found)
        return torch.cat([layers.letters(piece) for piece in found.split(at_once)])[:states]

    def _descend(
        self, depth: int, states: tuple[int, int], past: Past, past_from: int, found: Tensor
    ) -> None:
        """Run these states of a level and all that follow from them.

        `past` is that of the level before, from its state `past_from` on. What the last level's
        states answer by goes to `found`, (states, d_model).
        """
        evaluator, level = self.evaluator, self.levels[depth]
        sizes = (evaluator.positions_at_once, evaluator.positions_held)
        for low, high, rows in level.chunks(*states, *sizes, alike=evaluator.pieces_alike):
            # Rows beyond the last state are the last again.
            chunk = np.minimum(np.arange(low, low + rows), high - 1)
            parents = self._send(level.parents[chunk] - past_from)
            if depth < len(self.levels) - 1:
                self._extend(depth, (low, high), chunk, past, parents, found)
                continue
            answering = self.group.ends[level.first[chunk]] - 1
            at = None if (answering == level.end - 1).all() else self._send(answering - level.start)
            resid = self._resid(level, chunk)
            answers = evaluator.layers.answering(resid, past, parents, at)
            found[low:high] = answers[: high - low]

    def _extend(
        self,
        depth: int,
        states: tuple[int, int],
        chunk: np.ndarray,
        past: Past,
        parents: Tensor,
        found: Tensor,
    ) -> None:
        """These states, and all that follow from them. What is computed here goes before the next
        chunk begins."""
        resid = self._resid(self.levels[depth], chunk)
        longer = self.evaluator.layers.extend(resid, past, parents)
        children = self.levels[depth + 1].children(*states)
        self._descend(depth + 1, children, longer, states[0], found)

    def _resid(self, level: Level, states: np.ndarray) -> Tensor:
        """(states, positions, d_model) at the hook after the intervention."""
        first, here = level.first[states], slice(level.start, level.end)
        prompts = self._send(self.group.prompts[first])
        targets = self._send(-self.group.strengths[first, here].astype(np.float32))
        chosen = self._send(self.group.features[first])
        if compiled.is_usable(self.resid.shape[-1], self.resid, self.acts, self.directions):
            return compiled.intervene(
                self.resid, self.acts, prompts, level.start, chosen, targets, self.directions
            )
        # Whole rows of a narrowed view, which is several times as fast as an index of two axes.
        resid, acts = (t[:, here].index_select(0, prompts) for t in (self.resid, self.acts))
        change = torch.where(
            (acts > 0) & chosen[:, None], targets.to(acts.dtype)[:, :, None] - acts, 0.0
        )
        return resid.add_(matmul(change, self.directions))

    def _send(self, array: np.ndarray) -> Tensor:
        """To the device, without waiting for what it is at."""
        return torch.from_numpy(array).to(self.acts.device, non_blocking=True)
