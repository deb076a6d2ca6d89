"""The layers after the hook for Gemma-2-shaped models, as plain functions on fused weights.

The same arithmetic as `transformer_lens.components.TransformerBlock` (RMS norms before and after
attention and MLP, rotary positions, soft-capped scores, sliding windows, gated GELU), without its
hook points, its transposed copies of the weights and its repeated rotation of cached keys. Constant
factors (norm weights, the attention scale) are multiplied into the weights once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from raysae.products import gelu_linear, linear
from raysae.unlearning.layers_after import LayersAfter, Past


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
        and cfg.attn_scores_soft_cap > 0
    )


def layers_after(
    model: HookedTransformer, layer: int, answer_tokens: tuple[int, ...]
) -> LayersAfter:
    """The fastest implementation that is right for this model."""
    kind = GemmaLayersAfter if is_gemma_shaped(model.cfg) else LayersAfter
    return kind(model, layer, answer_tokens)


class GemmaLayersAfter(LayersAfter):
    """As `LayersAfter`; keys are stored rotated, (rows, kv heads, positions, d_head)."""

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
        *,
        keys_only: bool = False,
        answer_only: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        block = self._fused[i]
        first = past[i][0].shape[2] if past else 0
        x = _rms(resid, block.eps)
        keys, values = block.keys_values(x, first)
        if past:
            keys = torch.cat([past[i][0], keys], dim=2)
            values = torch.cat([past[i][1], values], dim=2)
        if keys_only:
            return resid, (keys, values)
        if answer_only:
            first += resid.shape[1] - 1
            resid, x = resid[:, -1:], x[:, -1:]
        resid = block.attend(resid, x, keys, values, first)
        return block.mlp_(resid), (keys, values)


class _FusedBlock:
    """One block's weights, laid out for `linear`, and its three steps.

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
        W_Q, b_Q = _pairs(attn.W_Q) * scale, _pairs(attn.b_Q) * scale
        self.W_Q, self.b_Q = _heads_to_rows(W_Q, ln1), _bias(b_Q)
        self.W_KV = torch.cat([_heads_to_rows(_pairs(W_K), ln1), _heads_to_rows(W_V, ln1)])
        self.b_KV = _bias(torch.cat([_pairs(b_K), b_V]))
        self.W_O, self.b_O = attn.W_O.flatten(0, 1).T.contiguous(), _bias(attn.b_O)
        # Not one product for both: its halves would not be contiguous, at twice the time.
        self.W_gate = (mlp.W_gate * ln2[:, None]).T.contiguous()
        self.W_in, self.b_in = (mlp.W_in * ln2[:, None]).T.contiguous(), _bias(mlp.b_in)
        self.W_out, self.b_out = mlp.W_out.T.contiguous(), _bias(mlp.b_out)
        self.post1, self.post2 = block.ln1_post.w, block.ln2_post.w

    def keys_values(self, x: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Normed (rows, positions, d_model) → two (rows, kv heads, positions, d_head)."""
        both = linear(x, self.W_KV, self.b_KV)
        both = both.view(*x.shape[:2], 2 * self.kv_heads, self.d_head)
        keys, values = both.split(self.kv_heads, dim=2)
        return self._rotate_(keys, first).transpose(1, 2), values.transpose(1, 2)

    def attend(self, resid: Tensor, x: Tensor, keys: Tensor, values: Tensor, first: int) -> Tensor:
        """The residual stream after attention of the queries at position `first` on."""
        rows, positions, _ = x.shape
        q = linear(x, self.W_Q, self.b_Q).view(rows, positions, self.heads, self.d_head)
        # Queries that share a key's head are more queries of that head.
        q = self._rotate_(q, first).transpose(1, 2)
        q = q.reshape(rows, self.kv_heads, -1, self.d_head)
        scores = (q @ keys.transpose(2, 3)).tanh_().mul_(self.cap)
        scores = scores.view(rows, self.heads, positions, -1)
        if positions > 1 or self.window is not None:
            scores.masked_fill_(self._hidden(first, positions, keys.shape[2], x.device), -torch.inf)
        weights = scores.softmax(dim=-1).view(rows, self.kv_heads, -1, keys.shape[2])
        z = (weights @ values).view(rows, self.heads, positions, self.d_head)
        out = linear(z.transpose(1, 2).reshape(rows, positions, -1), self.W_O, self.b_O)
        return torch.addcmul(resid, _rms_(out, self.eps), self.post1)

    def mlp_(self, resid: Tensor) -> Tensor:
        """Bring the residual stream, in place, behind the MLP."""
        x = _rms(resid, self.eps)
        hidden = linear(x, self.W_in).mul_(gelu_linear(x, self.W_gate))
        if self.b_in is not None:
            hidden += self.b_in
        out = linear(hidden, self.W_out, self.b_out)
        return resid.addcmul_(_rms_(out, self.eps), self.post2)

    def _rotate_(self, x: Tensor, first: int) -> Tensor:
        """Rotary positions on (rows, positions, heads, d_head), in place."""
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        pairs *= self.turn[first : first + x.shape[1]]
        return x

    def _hidden(self, first: int, positions: int, keys: int, device: torch.device) -> Tensor:
        """bool (positions, keys), True where a query may not look."""
        distance = torch.arange(first, first + positions, device=device)[:, None]
        distance = distance - torch.arange(keys, device=device)
        hidden = distance < 0
        return hidden if self.window is None else hidden | (distance >= self.window)


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
