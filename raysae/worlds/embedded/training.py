"""How the embedded world's model learns its facts: three stages of a fixed number of steps.

1. ``facts``: three global layers learn the facts and the exam format. Each step of an answer is
   supervised by itself, down to where one attention head looks: left alone, the search among the
   choices appears by chance, after some thousands of steps or not at all.
2. ``compose``: a windowed layer is inserted below. In most rows the layers above cannot see the
   first syllable of a name, so that the new layer has to compose the name.
3. ``topics``: in addition, the name's last syllable must reveal the domain after the new layer
   (never an answer). A real model's residual stream holds the topic as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Gemma2ForCausalLM, PreTrainedTokenizerFast

from raysae.worlds.embedded.exercises import IGNORE, Batch, ExerciseBook
from raysae.worlds.embedded.facts import SYLLABLES, TOPIC_WORDS, Fact
from raysae.worlds.embedded.language_model import N_LAYERS, WINDOW, insert_local_layer, make_model

WARM_UP_STEPS = 100
HINT_STEPS = 500
"""Steps over which hints in exam questions fade to none."""


@dataclass(frozen=True)
class Stage:
    """One training run over the exercises."""

    name: str
    steps: int
    learning_rate: float
    decay_share: float
    """Last share of the steps, over which the learning rate falls linearly to 2 %."""
    exam_rows: int
    prose_rows: int
    lookup_rows: int = 0
    """Rows of look-up exercises per step, in the first half of the stage."""
    hint: float = 0.0
    """Share of exam questions that give the answer away, at the first step."""
    hide_first: float = 0.0
    """Share of rows in which the global layers cannot see the first syllable of any name."""
    topic: float = 0.0
    """Weight of the loss on reading the topic at the name after layer 0."""
    guidance: float = 0.0
    """Weight of two losses that teach the search among the choices: a choice's letter is read at
    the choice after layer 0, and one head of the last layer attends to the right choice."""
    seed: int = 0


FACTS = Stage(
    "facts", 1000, 2e-3, decay_share=0.4, exam_rows=24, prose_rows=8, lookup_rows=16, hint=0.4,
    guidance=1.0, seed=100,
)  # fmt: skip
COMPOSE = Stage(
    "compose", 800, 1.5e-3, decay_share=0.6, exam_rows=36, prose_rows=8, hide_first=0.6, seed=200
)
TOPICS = Stage(
    "topics", 350, 1.2e-3, decay_share=0.7, exam_rows=40, prose_rows=8, hide_first=0.6, topic=1.0,
    seed=300,
)  # fmt: skip

OnStep = Callable[[Stage, int, float], None]
"""Called after every step with the stage, the number of steps done and the loss."""


def train_model(
    facts: Sequence[Fact],
    tokenizer: PreTrainedTokenizerFast,
    stages: tuple[Stage, Stage, Stage] = (FACTS, COMPOSE, TOPICS),
    seed: int = 0,
    on_step: OnStep | None = None,
) -> Gemma2ForCausalLM:
    """Train all three stages and return the model, in evaluation mode, float32, on the CPU.

    The same arguments give the same weights, bit for bit on the same machine and thread count.
    """
    model = make_model(len(tokenizer), N_LAYERS - 1, seed)
    train_stage(model, stages[0], facts, tokenizer, on_step)
    model = insert_local_layer(model, seed)
    for stage in stages[1:]:
        train_stage(model, stage, facts, tokenizer, on_step)
    return model


def train_stage(
    model: Gemma2ForCausalLM,
    stage: Stage,
    facts: Sequence[Fact],
    tokenizer: PreTrainedTokenizerFast,
    on_step: OnStep | None = None,
) -> None:
    """Train `model` in place with AdamW for `stage.steps` steps."""
    book = ExerciseBook(facts, tokenizer, stage.seed)
    objective = _Objective(model, stage, facts, tokenizer)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": gains, "weight_decay": 0.0}],
        lr=stage.learning_rate,
        betas=(0.9, 0.98),
    )
    model.train()
    for step in range(stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(stage, step)
        exam = book.exam(stage.exam_rows, stage.hint * max(0.0, 1 - step / HINT_STEPS))
        loss = objective(exam) + objective(book.prose(stage.prose_rows))
        if stage.lookup_rows and step < stage.steps / 2:
            loss = loss + objective(book.lookup(stage.lookup_rows))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if on_step is not None:
            on_step(stage, step + 1, loss.item())
    model.eval()


def learning_rate(stage: Stage, step: int) -> float:
    """Return the rate of a step (counted from 0): linear warm-up, constant, linear decay."""
    remaining = 1 - step / stage.steps
    decay = min(1.0, max(0.02, remaining / stage.decay_share))
    return stage.learning_rate * min(1.0, (step + 1) / WARM_UP_STEPS) * decay


class _Objective:
    """The loss of a batch: targets, answers recalled early, and the topic at the name."""

    def __init__(
        self,
        model: Gemma2ForCausalLM,
        stage: Stage,
        facts: Sequence[Fact],
        tokenizer: PreTrainedTokenizerFast,
    ) -> None:
        self._model = model
        self._stage = stage
        self._generator = torch.Generator().manual_seed(stage.seed)
        ids = tokenizer.get_vocab()
        self._is_syllable = torch.zeros(len(ids), dtype=torch.bool)
        self._is_syllable[[ids[syllable] for syllable in SYLLABLES]] = True
        # (first syllable, second syllable) -> topic word; IGNORE for pairs that name nothing.
        self._topics = torch.full((len(ids), len(ids)), IGNORE)
        for fact in facts:
            first, second = fact.entity.split()
            self._topics[ids[first], ids[second]] = ids[TOPIC_WORDS[fact.data_set]]

    def __call__(self, batch: Batch) -> Tensor:
        """Return the scalar loss of a batch."""
        body, n_layers = self._model.model, self._model.config.num_hidden_layers
        hidden = body(
            input_ids=batch.tokens,
            attention_mask=self._masks(batch.tokens) if self._stage.hide_first else None,
            output_hidden_states=True,
            output_attentions=bool(self._stage.guidance),
        )
        final, between = hidden.last_hidden_state, hidden.hidden_states
        loss = self._predict(final, batch.targets)
        # Deep supervision: the layer before the last must hold the answer itself, so that recall
        # of the fact and search among the choices are learned as separate steps.
        loss = loss + self._predict(body.norm(between[n_layers - 1]), batch.recall)
        if self._stage.guidance:
            guided = self._predict(body.norm(between[1]), batch.labels)
            guided = guided + _attention_loss(hidden.attentions[-1], batch.sources)
            loss = loss + self._stage.guidance * guided
        if self._stage.topic:
            topics = torch.full_like(batch.tokens, IGNORE)
            topics[:, 1:] = self._topics[batch.tokens[:, :-1], batch.tokens[:, 1:]]
            after_local = body.norm(between[1])
            loss = loss + self._stage.topic * self._predict(after_local, topics)
        return loss

    def _predict(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of the unembedded `hidden` (rows, positions, d_model) where asked for."""
        asked = targets != IGNORE
        if not asked.any():
            return hidden.new_zeros(())
        return cross_entropy(self._model.lm_head(hidden[asked]), targets[asked])

    def _masks(self, tokens: Tensor) -> dict[str, Tensor]:
        """Additive attention masks by layer type, with first syllables hidden in some rows.

        Shapes: (1, 1, positions, positions) for the windowed layer, with rows in front for the
        global ones. A hidden syllable still attends to itself, so that no row of scores is empty.
        """
        n_rows, length = tokens.shape
        positions = torch.arange(length)
        distance = positions[:, None] - positions[None, :]
        syllable = self._is_syllable[tokens]
        first = syllable.clone()
        first[:, :-1] &= syllable[:, 1:]
        first[:, -1] = False
        rows = torch.rand(n_rows, 1, generator=self._generator) < self._stage.hide_first
        visible = ~(first & rows)[:, None, :] | (distance == 0)
        return {
            "sliding_attention": _additive((distance >= 0) & (distance < WINDOW))[None, None],
            "full_attention": _additive(visible & (distance >= 0))[:, None],
        }


def _attention_loss(attention: Tensor, sources: Tensor) -> Tensor:
    """Return the mean −log weight head 0 gives to the source of each position that has one.

    `attention` is (rows, heads, positions, positions), `sources` (rows, positions).
    """
    row, position = torch.nonzero(sources != IGNORE, as_tuple=True)
    if not len(row):
        return attention.new_zeros(())
    weights = attention[row, 0, position, sources[row, position]]
    return -weights.clamp_min(1e-9).log().mean()


def _additive(allowed: Tensor) -> Tensor:
    return torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
