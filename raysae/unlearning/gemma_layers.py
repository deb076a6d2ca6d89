"""The layers after the hook for Gemma-2-shaped models, as plain functions on fused weights.

The same arithmetic as `transformer_lens.components.TransformerBlock` (RMS norms before and after
attention and MLP, rotary positions, soft-capped scores, sliding windows, gated GELU), without its
hook points, its transposed copies of the weights and its repeated rotation of cached keys. Constant
factors (norm weights, the attention scale and cap) are multiplied into the weights once.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from raysae.products import gelu_linear, linear, linear_times, tanh
from raysae.unlearning.layers_after import LayersAfter, Past

_GREATEST_CAP = 64
"""Of attention scores, whose exponentials are taken as they are: twice as much overflows."""
_POSITIONS_KEPT = 8
"""Pieces of a row of which rotations and masks are kept: a tree's levels ask for theirs again."""


def is_gemma_shaped(cfg: Any) -> bool:
    """True where `GemmaLayersAfter` computes what TransformerLens would."""
    return (
        cfg.original_architecture == "Gemma2ForCausalLM"
        and cfg.dtype == torch.float32
        and cfg.normalization_type in ("RMS", "RMSPre")
        and cfg.use_normalization_before_and_after
        and cfg.gated_mlp
        and cfg.act_fn == "gelu_pytorch_tanh"
        and cfg.positional_embedding_type == "rotary"
        and cfg.rotary_dim == cfg.d_head
        and not cfg.rotary_adjacent_pairs
        and not cfg.use_qk_norm
        and not cfg.use_attention_sinks
        and not cfg.use_logn_attn
        and not cfg.use_dynamic_ntk_rope
        and not cfg.parallel_attn_mlp
        and not cfg.attn_only
        and cfg.clip_qkv is None
        and 0 < cfg.attn_scores_soft_cap <= _GREATEST_CAP
    )


def layers_after(
    model: HookedTransformer, layer: int, answer_tokens: tuple[int, ...]
) -> LayersAfter:
    """The fastest implementation that is right for this model."""
    kind = GemmaLayersAfter if is_gemma_shaped(model.cfg) else LayersAfter
    return kind(model, layer, answer_tokens)


class GemmaLayersAfter(LayersAfter):
    """As `LayersAfter`.

    Keys, rotated, and values are kept as one tensor, (rows, kv heads, 2, positions, d_head): one
    copy takes both to another row, and either of them is a stack of matrices.
    """

    @torch.no_grad()
    def __init__(
        self, model: HookedTransformer, layer: int, answer_tokens: tuple[int, ...]
    ) -> None:
        super().__init__(model, layer, answer_tokens)
        self._fused = [_FusedBlock(block) for block in self.blocks]

    @torch.no_grad()
    def _block(
        self,
        i: int,
        resid: Tensor,
        past: Past,
        parents: Tensor,
        *,
        keys_only: bool = False,
        answer_only: bool = False,
    ) -> tuple[Tensor, Tensor]:
        block = self._fused[i]
        before = past[i] if past else None
        first = past[i].shape[3] if past else 0
        x = _rms(resid, block.eps)
        if keys_only:
            return resid, block.extended(before, parents, block.keys_values(x, first))
        if answer_only:
            longer = block.extended(before, parents, block.keys_values(x, first))
            first += resid.shape[1] - 1
            resid, queries = resid[:, -1:], block.queries(x[:, -1:], first)
        else:
            queries, keys_values = block.queries_keys_values(x, first)
            longer = block.extended(before, parents, keys_values)
        resid = block.attend(resid, queries, longer, first)
        is_last = i == len(self._fused) - 1  # whose MLP is left to `letters`
        return resid if is_last else block.mlp_(resid), longer

    def _behind_blocks(self, answering: Tensor) -> Tensor:
        return self._fused[-1].mlp_(answering) if self._fused else answering


class _FusedBlock:
    """One block's weights, laid out for `linear`, and its steps.

    Next to the products a step is bound by memory: passes over it are few, and in place.
    """

    def __init__(self, block: Any) -> None:
        attn, mlp, cfg = block.attn, block.mlp, block.cfg
        self.eps, self.heads, self.d_head = cfg.eps, cfg.n_heads, cfg.d_head
        self.cap = float(cfg.attn_scores_soft_cap)
        self.window = cfg.window_size if attn.attn_type == "local" else None
        grouped = cfg.n_key_value_heads is not None
        W_K, b_K = (attn._W_K, attn._b_K) if grouped else (attn.W_K, attn.b_K)
        W_V, b_V = (attn._W_V, attn._b_V) if grouped else (attn.W_V, attn.b_V)
        self.kv_heads = len(W_K)
        half = self.d_head // 2
        self.turn = torch.complex(attn.rotary_cos, attn.rotary_sin).detach()[:, None, :half]
        ln1, ln2 = _weight(block.ln1, cfg), _weight(block.ln2, cfg)
        scale = 1 / (attn.attn_scale * self.cap)
        W_QKV = _pairs(attn.W_Q) * scale, _pairs(W_K), W_V
        b_QKV = _pairs(attn.b_Q) * scale, _pairs(b_K), b_V
        self.W_QKV = torch.cat([_heads_to_rows(W, ln1) for W in W_QKV])
        self.b_QKV = _bias(torch.cat(b_QKV))
        self.W_O, self.b_O = attn.W_O.flatten(0, 1).T.contiguous(), _bias(attn.b_O)
        # Not one product for both: its halves would not be contiguous, at twice the time.
        self.W_gate = (mlp.W_gate * ln2[:, None]).T.contiguous()
        self.W_in, self.b_in = (mlp.W_in * ln2[:, None]).T.contiguous(), _bias(mlp.b_in)
        self.W_out, self.b_out = mlp.W_out.T.contiguous(), _bias(mlp.b_out)
        self.post1, self.post2 = block.ln1_post.w, block.ln2_post.w
        self._turns = lru_cache(_POSITIONS_KEPT)(self._make_turns)
        self._hidden = lru_cache(_POSITIONS_KEPT)(self._make_hidden)

    def queries_keys_values(self, x: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """What `queries` and `keys_values` make, by one product and one rotation."""
        return self._projected(x, first, 0, None)

    def queries(self, x: Tensor, first: int) -> Tensor:
        """Normed (rows, positions, d_model) → (rows, positions, heads, d_head)."""
        return self._projected(x, first, 0, self.heads)[0]

    def keys_values(self, x: Tensor, first: int) -> Tensor:
        """Normed (rows, positions, d_model) → (rows, positions, 2 · kv heads, d_head)."""
        return self._projected(x, first, self.heads, None)[1]

    def _projected(
        self, x: Tensor, first: int, low: int, high: int | None
    ) -> tuple[Tensor, Tensor]:
        """Of the heads `low` to `high`, in the order queries, keys, values, what is of queries, and
        what is of keys and values."""
        columns = slice(low * self.d_head, high and high * self.d_head)
        bias = None if self.b_QKV is None else self.b_QKV[columns]
        found = linear(x, self.W_QKV[columns], bias)
        found = found.view(*x.shape[:2], -1, self.d_head)
        queries = max(0, self.heads - low)
        turned = found[:, :, : self.heads + self.kv_heads - low]
        pairs = torch.view_as_complex(turned.unflatten(-1, (-1, 2)))
        pairs *= self._turns(first, x.shape[1])[:, : pairs.shape[2]]
        return found[:, :, :queries], found[:, :, queries:]

    def extended(self, past: Tensor | None, parents: Tensor, keys_values: Tensor) -> Tensor:
        """(rows, kv heads, 2, positions so far, d_head): of the parents, and behind it the new.

        Args:
            past: (rows of the past, kv heads, 2, positions before, d_head).
            parents: int64 (rows,).
            keys_values: as `keys_values` returns them.
        """
        rows, positions = keys_values.shape[:2]
        first = 0 if past is None else past.shape[3]
        longer = keys_values.new_empty(rows, self.kv_heads, 2, first + positions, self.d_head)
        if past is not None:
            torch.index_select(past, 0, parents, out=longer[:, :, :, :first])
        longer[:, :, :, first:] = keys_values.unflatten(2, (2, -1)).permute(0, 3, 2, 1, 4)
        return longer

    def attend(self, resid: Tensor, queries: Tensor, keys_values: Tensor, first: int) -> Tensor:
        """The residual stream after attention of the queries at position `first` on."""
        rows, positions = queries.shape[:2]
        # Queries that share a key's head are more queries of that head.
        q = queries.transpose(1, 2).reshape(rows * self.kv_heads, -1, self.d_head)
        keys, values = keys_values.flatten(0, 1).unbind(dim=1)
        scores = tanh(torch.bmm(q, keys.transpose(1, 2))).view(rows, self.heads, positions, -1)
        # A soft-max without a maximum: the cap bounds the exponents. Normed when summed up.
        exponent = self.cap / math.log(2)
        if positions > 1 or self.window is not None:
            hidden = self._hidden(first, positions, keys.shape[1])
            weights = torch.add(hidden, scores, alpha=exponent).exp2_()
        else:
            weights = scores.mul_(exponent).exp2_()
        weights = weights.view(*q.shape[:2], -1)
        z = torch.bmm(weights, values).div_(weights.sum(dim=-1, keepdim=True))
        z = z.view(rows, self.heads, positions, self.d_head)
        out = linear(z.transpose(1, 2).reshape(rows, positions, -1), self.W_O, self.b_O)
        return torch.addcmul(resid, _rms_(out, self.eps), self.post1)

    def mlp_(self, resid: Tensor) -> Tensor:
        """Bring the residual stream, in place, behind the MLP."""
        x = _rms(resid, self.eps)
        hidden = linear_times(x, self.W_in, gelu_linear(x, self.W_gate))
        if self.b_in is not None:
            hidden += self.b_in
        out = linear(hidden, self.W_out, self.b_out)
        return resid.addcmul_(_rms_(out, self.eps), self.post2)

    def _make_turns(self, first: int, positions: int) -> Tensor:
        """complex (positions, heads + kv heads, d_head / 2): rotary positions.

        Equal for all heads; repeated, as rows of a head are short for a pass over memory.
        """
        turn = self.turn[first : first + positions]
        return turn.expand(-1, self.heads + self.kv_heads, -1).contiguous()

    def _make_hidden(self, first: int, positions: int, keys: int) -> Tensor:
        """(positions, keys), -inf where a query may not look, otherwise 0."""
        device = self.W_O.device
        distance = torch.arange(first, first + positions, device=device)[:, None]
        distance = distance - torch.arange(keys, device=device)
        hidden = distance < 0
        if self.window is not None:
            hidden |= distance >= self.window
        return torch.zeros(hidden.shape, device=device).masked_fill_(hidden, -torch.inf)


def _rms(x: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, without a weight."""
    return x * _inverse_rms(x, eps)


def _rms_(x: Tensor, eps: float) -> Tensor:
    """The same in place."""
    return x.mul_(_inverse_rms(x, eps))


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse: Tensor = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return inverse


def _bias(b: Tensor) -> Tensor | None:
    """A bias as one row, None where it is zero: Gemma has none, TransformerLens adds it."""
    return b.detach().flatten() if b.any() else None


def _weight(norm: Any, cfg: Any) -> Tensor:
    """A norm's weight, ones where it was folded into the next layer."""
    return norm.w if hasattr(norm, "w") else torch.ones(cfg.d_model, device=cfg.device)


def _pairs(W: Tensor) -> Tensor:
    """(…, d_head) with the two that rotary positions turn together side by side, as one complex
    number. Queries and keys in the same order have the same products."""
    first, second = W.chunk(2, dim=-1)
    return torch.stack([first, second], dim=-1).flatten(-2)


def _heads_to_rows(W: Tensor, norm: Tensor) -> Tensor:
    """(heads, d_model, d_head) → (heads · d_head, d_model), scaled by the norm's weight."""
    return (W * norm[:, None]).transpose(1, 2).flatten(0, 1).contiguous()
