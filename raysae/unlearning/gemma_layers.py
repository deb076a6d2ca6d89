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

import numpy as np
import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from raysae.products import FixedWeight
from raysae.unlearning import compiled
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
    """As `LayersAfter`; see the blocks for what `Past` holds."""

    @torch.no_grad()
    def __init__(
        self, model: HookedTransformer, layer: int, answer_tokens: tuple[int, ...]
    ) -> None:
        super().__init__(model, layer, answer_tokens)
        self._before = [_Block(block) for block in self.blocks[:-1]]
        self._last = _LastBlock(self.blocks[-1]) if self.blocks else None

    @torch.no_grad()
    def extend(self, resid: Tensor, past: Past, parents: Tensor) -> Past:
        longer: Past = []
        if self._last is None:
            return longer
        x = self._last.normed(resid)
        for i, block in enumerate(self._before):
            resid, x, entry = block(resid, x, past[i] if past else None, parents, keep=True)
            longer.append(entry)
        longer.append(self._last.extended(x, past[-1] if past else None, parents))
        return longer

    @torch.no_grad()
    def answering(
        self, resid: Tensor, past: Past, parents: Tensor, at: Tensor | None = None
    ) -> Tensor:
        if self._last is None:
            return _at(resid, at)
        x = self._last.normed(resid)
        for i, block in enumerate(self._before):
            resid, x, _ = block(resid, x, past[i] if past else None, parents, keep=False)
        return self._last.answering(resid, x, past[-1] if past else None, parents, at)

    def _behind_blocks(self, answering: Tensor) -> Tensor:
        if self._last is None:
            return answering
        return self._last.behind_mlp(answering, self._last.normed(answering))[0]


class _FusedBlock:
    """One block's weights, fused, and its steps.

    Next to the products a step is bound by memory: passes over it are few, and in place.
    """

    def __init__(self, block: Any) -> None:
        attn, mlp, cfg = block.attn, block.mlp, block.cfg
        self.eps, self.heads, self.d_head = cfg.eps, cfg.n_heads, cfg.d_head
        self.cap = float(cfg.attn_scores_soft_cap)
        self.window = cfg.window_size if attn.attn_type == "local" else None
        self.kv_heads = cfg.n_key_value_heads or cfg.n_heads
        half = self.d_head // 2
        turn = torch.complex(attn.rotary_cos, attn.rotary_sin).detach()[:, :half]
        self.turn, self.compiled_turns = turn[:, None], compiled.Turns(turn)
        ln2 = _weight(block.ln2, cfg)
        self.W_O, self.b_O = FixedWeight(attn.W_O.flatten(0, 1).T), _bias(attn.b_O)
        # Not one product for both: its halves would not be contiguous, at twice the time.
        self.W_gate = FixedWeight((mlp.W_gate * ln2[:, None]).T)
        self.W_in, self.b_in = FixedWeight((mlp.W_in * ln2[:, None]).T), _bias(mlp.b_in)
        self.W_out, self.b_out = FixedWeight(mlp.W_out.T), _bias(mlp.b_out)
        self.post1, self.post2 = block.ln1_post.w.detach(), block.ln2_post.w.detach()
        self.is_compiled = compiled.serves_heads(self.d_head) and compiled.is_usable(
            cfg.d_model, self.post1
        )
        self.turns = lru_cache(_POSITIONS_KEPT)(self._make_turns)
        self.hidden = lru_cache(_POSITIONS_KEPT)(self._make_hidden)

    def normed(self, resid: Tensor) -> Tensor:
        """RMS norm, without a weight."""
        return _rms(resid, self.eps)

    def behind(self, resid: Tensor, update: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream with a normed update, whose memory it takes, and normed itself."""
        if self.is_compiled:
            return compiled.add_normed(resid, update, weight, self.eps)
        resid = torch.addcmul(resid, _rms_(update, self.eps), weight, out=update)
        return resid, self.normed(resid)

    def behind_attention(self, resid: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream (…, d_model), and normed, `z` the heads' (…, heads · d_head)."""
        return self.behind(resid, self.W_O.linear(z, self.b_O), self.post1)

    def behind_mlp(self, resid: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream, and normed; `x` is `resid` normed."""
        hidden = self.W_in.times(x, self.W_gate.gelu(x))
        if self.b_in is not None:
            hidden += self.b_in
        return self.behind(resid, self.W_out.linear(hidden, self.b_out), self.post2)

    def turned_(self, projected: Tensor, turns: Tensor) -> Tensor:
        """Queries or keys (rows, positions, heads, d_head), in place, at rotary positions.

        Args:
            projected: as said.
            turns: complex (…, positions, at least those heads, d_head / 2).
        """
        pairs = torch.view_as_complex(projected.unflatten(-1, (-1, 2)))
        pairs *= turns[..., : pairs.shape[2], :]
        return projected

    def weights(self, queries: Tensor, keys: Tensor, hidden: Tensor | None) -> Tensor:
        """Attention's, not yet divided by their sum: (rows, heads, queries, keys).

        A soft-max without a maximum: the cap bounds the exponents.

        Args:
            queries: (rows, heads, queries, d_head), contiguous.
            keys: (rows, kv heads, keys, d_head).
            hidden: (queries, keys) or (rows, 1, queries, keys), -inf where a query may not look.
        """
        rows, _, n, _ = queries.shape
        # Queries that share a key's head are more queries of that head.
        q = queries.view(rows * self.kv_heads, -1, self.d_head)
        scores = _tanh_(torch.bmm(q, keys.flatten(0, 1).transpose(1, 2)))
        scores = scores.view(rows, self.heads, n, -1)
        exponent = self.cap / math.log(2)
        if hidden is None:
            return scores.mul_(exponent).exp2_()
        return torch.add(hidden, scores, alpha=exponent).exp2_()

    def _make_turns(self, first: int, positions: int) -> Tensor:
        """complex (positions, heads + kv heads, d_head / 2): rotary positions.

        Equal for all heads; repeated, as rows of a head are short for a pass over memory.
        """
        turn = self.turn[first : first + positions]
        return turn.expand(-1, self.heads + self.kv_heads, -1).contiguous()

    def _make_hidden(self, first: int, positions: int, keys: int) -> Tensor:
        """(positions, keys), see `hidden_from`."""
        return self.hidden_from(
            torch.arange(first, first + positions, device=self.turn.device), keys
        )

    def hidden_from(self, positions: Tensor, keys: int) -> Tensor:
        """(…, keys), -inf where a query at that position (…,) may not look, otherwise 0."""
        distance = positions[..., None] - torch.arange(keys, device=positions.device)
        hidden = distance < 0
        if self.window is not None:
            hidden |= distance >= self.window
        return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, -torch.inf)


class _Block(_FusedBlock):
    """Any but the last.

    Its keys, rotated, and values are kept as one tensor, (rows, kv heads, 2, positions, d_head):
    one copy takes both to another row, and either of them is a stack of matrices.
    """

    def __init__(self, block: Any) -> None:
        super().__init__(block)
        weights, biases = _projections(block)
        self.W_QKV, self.b_QKV = FixedWeight(torch.cat(weights)), _bias(torch.cat(biases))

    def __call__(
        self, resid: Tensor, x: Tensor, past: Tensor | None, parents: Tensor, *, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The residual stream behind the block at new positions, the same normed, and, if they are
        to be kept, all keys and values so far.

        Arguments as of `LayersAfter.extend`, `x` is `resid` normed, `past` this block's.
        """
        projected = self.W_QKV.linear(x, self.b_QKV).unflatten(-1, (-1, self.d_head))
        if self.is_compiled:
            z, longer = compiled.attend(
                projected, past, parents, self.compiled_turns, self.heads, self.cap, self.window,
                keep,
            )  # fmt: skip
        else:
            z, longer = self._attend(projected, past, parents)
        resid, x = self.behind_attention(resid, z)
        return *self.behind_mlp(resid, x), longer

    def _attend(
        self, projected: Tensor, past: Tensor | None, parents: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `compiled.attend`, of a batch of matrices for each step."""
        rows, positions = projected.shape[:2]
        first = 0 if past is None else past.shape[-2]
        turned = projected[:, :, : self.heads + self.kv_heads]
        self.turned_(turned, self.turns(first, positions))
        new = projected[:, :, self.heads :].unflatten(2, (2, -1)).permute(0, 3, 2, 1, 4)
        longer = _extended(past, parents, new)
        keys, values = longer.unbind(dim=2)
        queries = projected[:, :, : self.heads].transpose(1, 2).contiguous()
        hidden = None
        if positions > 1 or self.window is not None:
            hidden = self.hidden(first, positions, first + positions)
        weights = self.weights(queries, keys, hidden)
        weights = weights.view(rows * self.kv_heads, -1, first + positions)
        z = torch.bmm(weights, values.flatten(0, 1)).div_(weights.sum(dim=-1, keepdim=True))
        z = z.view(rows, self.heads, positions, -1).transpose(1, 2)
        return z.reshape(rows, positions, -1), longer


class _LastBlock(_FusedBlock):
    """The last, of which one position of a row is asked for.

    Its weights mix what values would be projected from, for one head and position as good as for
    another, and the mixture is projected. Kept are keys, (rows, kv heads, positions, d_head), and
    the normed residual stream, (rows, positions, d_model).
    """

    def __init__(self, block: Any) -> None:
        super().__init__(block)
        (W_Q, W_K, W_V), (b_Q, b_K, b_V) = _projections(block)
        self.W_Q, self.b_Q = FixedWeight(W_Q), _bias(b_Q)
        self.W_K, self.b_K = FixedWeight(W_K), _bias(b_K)
        self.W_V = W_V.unflatten(0, (self.kv_heads, -1)).mT.contiguous()
        self.b_V = b_V.view(self.kv_heads, 1, -1) if b_V.any() else None

    def extended(
        self, x: Tensor, past: tuple[Tensor, Tensor] | None, parents: Tensor
    ) -> tuple[Tensor, Tensor]:
        """All so far. `x` is the residual stream normed, `past` this block's."""
        keys, normed = past or (None, None)
        first = 0 if keys is None else keys.shape[-2]
        new = self.turned_(self._projected(x, self.W_K, self.b_K), self.turns(first, x.shape[1]))
        return _extended(keys, parents, new.transpose(1, 2)), _extended(normed, parents, x)

    def answering(
        self,
        resid: Tensor,
        x: Tensor,
        past: tuple[Tensor, Tensor] | None,
        parents: Tensor,
        at: Tensor | None,
    ) -> Tensor:
        """(rows, d_model) before the MLP. Arguments as of `LayersAfter.answering`, `x` is `resid`
        normed."""
        if self.is_compiled:
            positions = torch.full((len(x),), x.shape[1] - 1) if at is None else at
            mixed = compiled.attend_once(
                self._projected(_at(x, at), self.W_Q, self.b_Q),
                self._projected(x, self.W_K, self.b_K),
                x, past, parents, positions, self.compiled_turns, self.cap, self.window,
            )  # fmt: skip
        else:
            mixed = self._attend_once(x, past, parents, at)
        return self.behind_attention(_at(resid, at), self._values(mixed))[0]

    def _attend_once(
        self,
        x: Tensor,
        past: tuple[Tensor, Tensor] | None,
        parents: Tensor,
        at: Tensor | None,
    ) -> Tensor:
        """As `compiled.attend_once`, (rows, heads, d_model)."""
        keys, normed = self.extended(x, past, parents)
        n = normed.shape[1]
        hidden = None
        if at is None:
            turns = self.turns(n - 1, 1)
            if self.window is not None:
                hidden = self.hidden(n - 1, 1, n)
        else:
            position = n - x.shape[1] + at[:, None]
            turns, hidden = self.turn[position], self.hidden_from(position, n)[:, None]
        queries = self._projected(_at(x, at)[:, None], self.W_Q, self.b_Q)
        queries = self.turned_(queries, turns).transpose(1, 2)
        weights = self.weights(queries, keys, hidden)[:, :, 0]
        mixed: Tensor = torch.bmm(weights, normed).div_(weights.sum(dim=-1, keepdim=True))
        return mixed

    def _projected(self, x: Tensor, weight: FixedWeight, bias: Tensor | None) -> Tensor:
        """(…, d_model) → (…, heads, d_head)."""
        found: Tensor = weight.linear(x, bias).unflatten(-1, (-1, self.d_head))
        return found

    def _values(self, mixed: Tensor) -> Tensor:
        """(rows, heads, d_model) → (rows, heads · d_head)."""
        of_head = mixed.unflatten(1, (self.kv_heads, -1)).transpose(0, 1).flatten(1, 2)
        z: Tensor = torch.bmm(of_head, self.W_V).unflatten(1, (len(mixed), -1)).transpose(0, 1)
        if self.b_V is not None:
            z = z + self.b_V
        return z.flatten(1)


def _extended(past: Tensor | None, parents: Tensor, new: Tensor) -> Tensor:
    """(rows, …, positions so far, d): the parents' of (rows of the past, …, positions before, d),
    and behind it the new."""
    first = 0 if past is None else past.shape[-2]
    *rows, positions, d = new.shape
    longer = new.new_empty(*rows, first + positions, d)
    if past is not None:
        torch.index_select(past, 0, parents, out=longer[..., :first, :])
    longer[..., first:, :] = new
    return longer


def _at(resid: Tensor, at: Tensor | None) -> Tensor:
    """(rows, d_model) at one position of each row, or the last one."""
    if at is None:
        return resid[:, -1]
    return resid[torch.arange(len(at), device=at.device), at]


def _tanh_(x: Tensor) -> Tensor:
    """The hyperbolic tangent of float32, in place; NumPy takes a tenth of PyTorch's time for it."""
    if not x.is_cpu:
        return x.tanh_()
    np.tanh(x.numpy(), out=x.numpy())
    return x


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


def _projections(block: Any) -> tuple[list[Tensor], list[Tensor]]:
    """To queries, keys and values: weights (heads · d_head, d_model) and biases (heads · d_head,),
    the norm's weight and the attention's scale and cap multiplied in."""
    attn, cfg = block.attn, block.cfg
    grouped = cfg.n_key_value_heads is not None
    W_K, b_K = (attn._W_K, attn._b_K) if grouped else (attn.W_K, attn.b_K)
    W_V, b_V = (attn._W_V, attn._b_V) if grouped else (attn.W_V, attn.b_V)
    scale = 1 / (attn.attn_scale * float(cfg.attn_scores_soft_cap))
    norm = _weight(block.ln1, cfg)
    weights = _pairs(attn.W_Q) * scale, _pairs(W_K), W_V
    biases = _pairs(attn.b_Q) * scale, _pairs(b_K), b_V
    return [_heads_to_rows(W, norm) for W in weights], [b.detach().flatten() for b in biases]


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
