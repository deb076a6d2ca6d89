"""The layers after the hook, in pieces: extend a row by some positions, or finish it and answer.

Attention is causal, so what a position computes depends on itself and on the keys and values of
earlier positions (`Past`) only. Rows that agree up to some position can therefore share the work up
to there. In the last layer only the answering position needs a query and an MLP.

`LayersAfter` goes through TransformerLens' own blocks and serves any `HookedTransformer` whose
layers see nothing but the residual stream. `raysae.unlearning.gemma_layers` is the same for
Gemma-2-shaped models without TransformerLens' overhead; `layers_after` chooses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry
from transformer_lens.utilities.activation_functions import apply_softcap
from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES

Past = list[Any]
"""By layer, keys and values of the positions so far, rows first, as each class keeps them. Empty at
position 0."""

# These transform queries and keys between the projection and the key/value entry.
_OTHER_KEYS = {"OlmoeForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM", *POST_NORM_ARCHITECTURES}


class LayersAfter:
    """The part of a model behind ``blocks.layer.hook_resid_post``; keys are stored unrotated."""

    def __init__(
        self, model: HookedTransformer, layer: int, answer_tokens: tuple[int, ...]
    ) -> None:
        """Take the blocks behind `layer` and the columns of the unembedding that answer.

        Raises ValueError for position embeddings that are added in every layer and for models
        that are not causal: neither is a function of the residual stream and earlier positions.
        """
        cfg = model.cfg
        if cfg.positional_embedding_type in ("shortformer", "relative_positional_bias"):
            raise ValueError(
                f"position embeddings of type {cfg.positional_embedding_type!r} are not supported"
            )
        if cfg.attention_dir != "causal":
            raise ValueError(f"attention must be causal, not {cfg.attention_dir!r}")
        self.model = model
        self.blocks: list[Any] = list(model.blocks)[layer + 1 :]
        columns = torch.tensor(answer_tokens, device=model.W_U.device)
        self._W_answers = model.W_U.detach()[:, columns].T.contiguous()
        self._b_answers = model.b_U.detach()[columns]
        plain = cfg.original_architecture not in _OTHER_KEYS and cfg.clip_qkv is None
        self._last_keys_only = plain and not (cfg.use_attn_in or cfg.use_split_qkv_input)

    def extend(self, resid: Tensor, past: Past, parents: Tensor) -> Past:
        """Keys and values with these positions appended.

        Args:
            resid: (rows, positions, d_model) at the hook.
            past: up to these positions.
            parents: int64 (rows,) which of the past's rows each one goes on from.
        """
        longer: Past = []
        for i in range(len(self.blocks)):
            is_last = i == len(self.blocks) - 1
            resid, entry = self._block(i, resid, past, parents, keys_only=is_last)
            longer.append(entry)
        return longer

    def answering(
        self, resid: Tensor, past: Past, parents: Tensor, at: Tensor | None = None
    ) -> Tensor:
        """What `letters` reads of each row: (rows, d_model).

        Args:
            resid: (rows, positions, d_model) at the hook.
            past: up to these positions.
            parents: int64 (rows,) which of the past's rows each one goes on from.
            at: int64 (rows,) which of these positions answers; None: the last one.
        """
        for i in range(len(self.blocks)):
            answers = i == len(self.blocks) - 1 and at is None
            resid, _ = self._block(i, resid, past, parents, answer_only=answers)
        if at is None:
            return resid[:, -1]
        return resid[torch.arange(len(at), device=at.device), at]

    def letters(self, answering: Tensor) -> Tensor:
        """The answers, int64 (rows,) in 0 to 3, as SAEBench's arg max over the letters.

        Better asked for many rows at once. `answering` is not kept.
        """
        last = self._behind_blocks(answering)
        if self.model.cfg.normalization_type is not None:
            last = self.model.ln_final(last[:, None])[:, 0]
        logits = torch.nn.functional.linear(last, self._W_answers, self._b_answers)
        logits = apply_softcap(logits, self.model.cfg.output_logits_soft_cap)
        # The larger of "A" and " A" counts; the soft-max that SAEBench takes keeps the order.
        return logits.reshape(-1, 2, 4).amax(dim=1).argmax(dim=1)

    def _behind_blocks(self, answering: Tensor) -> Tensor:
        return answering

    def _block(
        self,
        i: int,
        resid: Tensor,
        past: Past,
        parents: Tensor,
        *,
        keys_only: bool = False,
        answer_only: bool = False,
    ) -> tuple[Tensor, Any]:
        """One block over new positions: its output, and all keys and values.

        With `keys_only` the output is not needed, with `answer_only` only its last position.
        """
        block = self.blocks[i]
        entry = TransformerLensKeyValueCacheEntry.init_cache_entry(
            self.model.cfg, resid.device, len(resid)
        )
        if past:
            entry.past_keys, entry.past_values = (t.index_select(0, parents) for t in past[i])
        if keys_only and self._last_keys_only:
            entry.append(*self._keys_values(block, resid))
        elif answer_only and self._last_keys_only:
            entry.append(*self._keys_values(block, resid[:, :-1]))
            resid = block(resid[:, -1:], past_kv_cache_entry=entry)
        else:
            resid = block(resid, past_kv_cache_entry=entry)
        return resid, (entry.past_keys, entry.past_values)

    @staticmethod
    def _keys_values(block: Any, resid: Tensor) -> tuple[Tensor, Tensor]:
        x = block.ln1(resid)
        _, keys, values = block.attn.calculate_qkv_matrices(x, x, x)
        return keys, values
