"""Forward passes of a stack of SAEs: SAELens' formulas, with a leading member axis.

Batches are (m, n, d_in), each member's own or one expanded. Each function gives what SAELens'
`training_forward_pass` gives for each member: reconstruction (less the batch), activations and loss
terms (sae-lens 6.54, `sae_lens.saes`). Its rescaling of activations by decoder norms is left out of
the reconstruction, where the norm cancels; decoder rows are kept at norm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from sae_lens.saes.jumprelu_sae import JumpReLU, Step
from sae_lens.saes.topk_sae import calculate_topk_aux_acts
from torch import Tensor

from raysae import products
from raysae.regularizers.activations import Activations, DenseActivations
from raysae.training.dense import affine, encode, product, products_dtype, reconstruct
from raysae.training.fit import fit
from raysae.training.largest import largest, largest_of_rows
from raysae.training.sparse import SparseActivations, Support, decode, encode_at

SPARSE = 1 / 10
"""Share of the activations below which sums over what fires are faster than matrix products."""

LAID_OUT = 1 / 600
"""Share of the activations above which a GPU's dense products are faster than sums over what fires
(benchmarks/train_step.py at 64 of 16,384 and of 65,536)."""

PICKED_FROM = 256 << 20
"""Bytes of pre-activations that are there at once where the largest of them are picked."""

Mask = npt.NDArray[np.bool_]
Parameters = dict[str, Tensor]
"""SAELens' parameters by name, stacked: W_enc (m, d_in, d_sae), W_dec (m, d_sae, d_in), …"""


@dataclass(frozen=True)
class Settings:
    """What differs between the members of a stack, beside their parameters."""

    k: float
    dead: Tensor | None
    """Which features count as dead: (places,) int64, −1 in places left over; None: none does."""
    widths: tuple[int, ...]
    """Of a Matryoshka SAE, ascending; () otherwise."""
    bandwidth: float
    """Of a JumpReLU's straight-through estimator; 0 otherwise."""


@dataclass(frozen=True)
class DenseActs:
    """Activations (m, n, d_sae) of architectures that may fire anywhere; in any dtype."""

    acts: Tensor

    def members(self) -> list[Activations]:
        """Each member's own, differentiable."""
        return [DenseActivations(acts) for acts in self.acts.unbind()]

    def fired(self, is_forget: Tensor) -> Tensor:
        """(m, 2, d_sae): forget and retain tokens on which each feature fires; labels (m, n).
        In float32 at least, as counts over a batch do not fit less."""
        dtype = torch.promote_types(self.acts.dtype, torch.float32)
        tasks = torch.stack([is_forget, ~is_forget], 1)
        if not self.acts.is_cuda:  # a comparison takes it longer than a sign
            return tasks.to(dtype) @ self.acts.sign().to(dtype)
        half = torch.bfloat16  # ones are exact, and summed up in float32
        return product(tasks.to(half), (self.acts > 0).to(half), torch.float32).to(dtype)


@dataclass(frozen=True)
class SparseActs:
    """Activations of architectures that pick their features, as values at a `Support`."""

    support: Support
    values: Tensor

    def members(self) -> list[Activations]:
        """Each member's own, differentiable."""
        values = self.values.split(self.support.sizes)
        supports = self.support.of_members()
        return [SparseActivations(s, v) for s, v in zip(supports, values, strict=True)]

    def fired(self, is_forget: Tensor) -> Tensor:
        """(m, 2, d_sae): forget and retain tokens on which each feature fires; labels (m, n)."""
        fires = (self.values > 0).to(self.values.dtype)
        on_forget = fires * is_forget.flatten().index_select(0, self.support.rows)
        counts = [self.support.count_by_feature(v) for v in (on_forget, fires - on_forget)]
        return torch.stack(counts, 1)


@dataclass(frozen=True)
class Forward:
    """What a stack's forward pass gives."""

    error: Tensor  # reconstruction − batch (m, n, d_in)
    acts: DenseActs | SparseActs
    losses: dict[str, Tensor]
    """SAELens' loss terms by name, (m,) each; the term of `SPARSITY_TERMS` without its coefficient.
    Their sum with it is a member's own loss."""


def standard(p: Parameters, batch: Tensor, members: list[Settings]) -> Forward:  # noqa: ARG001
    """ReLU and an L1 term weighted by decoder norms."""
    dtype = products_dtype(batch)
    with torch.no_grad():
        centred = (batch - p["b_dec"][:, None]).to(dtype)
        pre = affine(p["b_enc"].to(dtype), centred, p["W_enc"].to(dtype))
        if not batch.is_cuda:  # to wait for the count costs a GPU more than is saved
            fires = _positive(pre)
            if np.count_nonzero(fires) < SPARSE * fires.size:
                with torch.enable_grad():
                    return _standard_where(fires, pre, centred, p, batch)
        acts = pre.relu_()
    decoded, acts, l1 = reconstruct(acts, centred, p["W_enc"], p["b_enc"], p["W_dec"], p["b_dec"])
    same = centred.dtype == batch.dtype
    error, mse = fit(decoded, batch, p["b_dec"], centred if same else None)
    return Forward(error, DenseActs(acts), {"mse_loss": mse, "l1_loss": l1})


def _positive(x: Tensor) -> Mask:
    """Where `x` is positive: NumPy finds out, and where, in a fifth of PyTorch's time.

    Or NaN, which is not to pass for a feature that is silent.
    """
    rest = (x <= 0).numpy() if x.dtype == torch.bfloat16 else x.numpy() <= 0
    return np.logical_not(rest, out=rest)


def _standard_where(
    fires: Mask, pre: Tensor, centred: Tensor, p: Parameters, batch: Tensor
) -> Forward:
    """The same from what fires alone: a ReLU passes no gradient elsewhere."""
    at = torch.from_numpy(np.flatnonzero(fires))
    support = Support.from_flat(at, tuple(map(np.count_nonzero, fires)), *pre.shape)
    values, centred = pre.flatten().index_select(0, at).to(batch.dtype), centred.to(batch.dtype)
    found = encode_at(support, values, centred, p["W_enc"], p["b_enc"], p["b_dec"])
    error, mse = fit(decode(support, found, p["W_dec"]), batch, p["b_dec"], centred)
    norms = p["W_dec"].norm(dim=-1).flatten().index_select(0, support.features)
    of_members = (found * norms).split(support.sizes)
    l1 = torch.stack([weighted.sum() for weighted in of_members]) / support.n
    return Forward(error, SparseActs(support, found), {"mse_loss": mse, "l1_loss": l1})


def gated(p: Parameters, batch: Tensor, members: list[Settings]) -> Forward:  # noqa: ARG001
    """A gate that decides what fires, a magnitude that shares its weights, and the gate's own L1
    and reconstruction terms."""
    pre = encode(batch, p["W_enc"], p["b_dec"])
    gate = pre + p["b_gate"][:, None]
    magnitude = (pre * p["r_mag"].exp()[:, None] + p["b_mag"][:, None]).relu()
    acts = (gate > 0).to(batch.dtype) * magnitude
    error, mse = fit(products.matmul(acts, p["W_dec"]), batch, p["b_dec"])
    gate = gate.relu()
    l1 = _weighted_l1(gate, p["W_dec"])
    _, of_gate = fit(products.matmul(gate, p["W_dec"]), batch, p["b_dec"])
    losses = {"mse_loss": mse, "l1_loss": l1, "auxiliary_reconstruction_loss": of_gate}
    return Forward(error, DenseActs(acts), losses)


def jumprelu(p: Parameters, batch: Tensor, members: list[Settings]) -> Forward:
    """JumpReLU with SAELens' straight-through estimators and an L0 term."""
    pre = encode(batch, p["W_enc"], p["b_dec"]) + p["b_enc"][:, None]
    pre = pre.transpose(0, 1)  # the estimators sum over axis 0
    threshold, bandwidth = p["threshold"].to(pre.dtype), members[0].bandwidth
    acts = JumpReLU.apply(pre, threshold, bandwidth, False).transpose(0, 1)
    error, mse = fit(products.matmul(acts, p["W_dec"]), batch, p["b_dec"])
    l0 = Step.apply(pre, threshold, bandwidth, False).sum(-1).mean(0)
    return Forward(error, DenseActs(acts), {"mse_loss": mse, "l0_loss": l0})


def topk(p: Parameters, batch: Tensor, members: list[Settings]) -> Forward:
    """The k largest of every token."""
    return _picked(p, batch, members, _largest_of_tokens)[0]


def batchtopk(p: Parameters, batch: Tensor, members: list[Settings]) -> Forward:
    """The k · n largest of the batch."""
    return _picked(p, batch, members, _largest_of_batch)[0]


def matryoshka_batchtopk(p: Parameters, batch: Tensor, members: list[Settings]) -> Forward:
    """BatchTopK, with the reconstruction of every prefix of the features as a further term."""
    forward, support, values, centred = _picked(p, batch, members, _largest_of_batch)
    laid_out = products_dtype(batch) if _lays_out(support) else None
    local = support.features % support.d_sae
    for width in members[0].widths[:-1]:
        inner = decode(support, values * (local < width), p["W_dec"], laid_out=laid_out)
        _, forward.losses[f"inner_mse_loss_{width}"] = fit(inner, batch, p["b_dec"], centred)
    return forward


FORWARD: dict[str, Callable[[Parameters, Tensor, list[Settings]], Forward]] = {
    f.__name__: f for f in (standard, gated, jumprelu, topk, batchtopk, matryoshka_batchtopk)
}

SPARSITY_TERMS = ("l1_loss", "l0_loss")

PICKING = ("topk", "batchtopk", "matryoshka_batchtopk")
"""Architectures that pick their features, with an auxiliary loss that brings dead ones back."""


def _weighted_l1(acts: Tensor, W_dec: Tensor) -> Tensor:
    """(m,) sum of a token's activations, weighted by decoder norms, mean over the batch."""
    with torch.autocast(acts.device.type, enabled=False):  # a sum over d_sae, and no large product
        weighted: Tensor = acts @ W_dec.norm(dim=-1)[:, :, None]
    return weighted.squeeze(-1).mean(1)


def _picked(
    p: Parameters,
    batch: Tensor,
    members: list[Settings],
    pick: Callable[[Iterator[Tensor], torch.Size, list[Settings]], tuple[Support, Tensor]],
) -> tuple[Forward, Support, Tensor, Tensor]:
    """Also the support, the values at it without SAELens' factor, the decoder's norm, and
    batch − b_dec."""
    with torch.no_grad():
        centred = batch - p["b_dec"][:, None]
        operands = (p["b_enc"], centred, p["W_enc"])
        if batch.is_cuda:
            support, values = pick(*_pre_activations_in_pieces(*operands), members)
        else:  # each member's pre-activations are picked from while a cache has them
            of_members = zip(*(x.split(1) for x in operands), strict=True)
            picks = [
                pick(*_pre_activations_in_pieces(*of_member), [member])
                for of_member, member in zip(of_members, members, strict=True)
            ]
            support = Support.joined([own for own, _ in picks])
            values = torch.cat([found for _, found in picks])
        values = values.to(batch.dtype)
    laid_out = products_dtype(batch) if _lays_out(support) else None
    parameters = (p["W_enc"], p["b_enc"], p["b_dec"])
    values = encode_at(support, values, centred, *parameters, laid_out=laid_out).relu()
    decoded = decode(support, values, p["W_dec"], laid_out=laid_out)
    error, mse = fit(decoded, batch, p["b_dec"], centred)
    losses = {
        "mse_loss": mse,
        "auxiliary_reconstruction_loss": _revive(p, batch, error, members),
    }
    norms = p["W_dec"].norm(dim=-1).flatten().index_select(0, support.features)
    forward = Forward(error, SparseActs(support, values * norms), losses)
    return forward, support, values, centred


def _lays_out(support: Support) -> bool:
    """Whether what fires is laid out among zeros for dense products, of which a GPU makes
    thousands in the time that it takes to gather one row."""
    at_most = LAID_OUT * support.members * support.n * support.d_sae
    return support.features.is_cuda and len(support.features) > at_most


def _pre_activations_in_pieces(
    b_enc: Tensor, centred: Tensor, W_enc: Tensor
) -> tuple[Iterator[Tensor], torch.Size]:
    """(m, rows, d_sae) of some tokens after the others: to pick from, no more is needed at once.
    And the shape (m, n, d_sae) of all."""
    (members, n, _), d_sae = centred.shape, W_enc.shape[-1]
    rows = max(1, PICKED_FROM // (4 * members * d_sae))
    pieces = (affine(b_enc, piece, W_enc) for piece in centred.split(rows, dim=1))
    return pieces, torch.Size((members, n, d_sae))


def _largest_of_tokens(
    pieces: Iterator[Tensor], shape: torch.Size, members: list[Settings]
) -> tuple[Support, Tensor]:
    """The k largest of each token.

    Args:
        pieces, shape: pre-activations, see `_pre_activations_in_pieces`.
        members: of the stack.

    Returns:
        The support, and the pre-activations at it.
    """
    ks = [int(member.k) for member in members]
    if len(set(ks)) == 1:
        picked = [_top(hidden, ks[0]) for hidden in pieces]
        values, indices = (torch.cat(parts, 1) for parts in zip(*picked, strict=True))
        return Support.from_indices(indices, shape[-1]), values.flatten()
    tops = [[hidden[i].topk(k, sorted=False) for i, k in enumerate(ks)] for hidden in pieces]
    at, found = [], []
    for i, of_member in enumerate(zip(*tops, strict=True)):
        values, indices = (torch.cat(parts) for parts in zip(*of_member, strict=True))
        rows = i * shape[1] + torch.arange(shape[1], device=indices.device)
        at.append((indices + rows[:, None] * shape[-1]).flatten())
        found.append(values.flatten())
    sizes = tuple(map(len, found))
    return Support.from_flat(torch.cat(at), sizes, *shape), torch.cat(found)


def _top(hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and columns of the k largest of every token of (m, n, d_sae), (m, n, k) each."""
    if hidden.is_cuda:
        return hidden.topk(k, sorted=False)
    columns = largest_of_rows(hidden.flatten(0, 1), k).view(*hidden.shape[:2], k)
    return hidden.gather(2, columns), columns


def _largest_of_batch(
    pieces: Iterator[Tensor], shape: torch.Size, members: list[Settings]
) -> tuple[Support, Tensor]:
    """The k · n largest of each member's batch; arguments and result as above."""
    _, n, d_sae = shape
    wanted = [int(member.k * n) for member in members]
    best: list[list[tuple[Tensor, Tensor]]] = [[] for _ in members]
    start = 0
    for hidden in pieces:
        flat = hidden.flatten(1)
        for i, chosen in enumerate(_largest_of_each(flat, wanted)):
            best[i].append((flat[i].index_select(0, chosen), chosen + start))
        start += hidden[0].numel()
    at, found = [], []
    for i, of_member in enumerate(best):
        values, positions = (torch.cat(parts) for parts in zip(*of_member, strict=True))
        if len(of_member) > 1:
            among = largest(values, wanted[i])
            values, positions = values[among], positions[among]
        if positions.is_cuda:
            order = positions.argsort()
            values, positions = values[order], positions[order]
        at.append(positions + i * n * d_sae)
        found.append(values)
    return Support.from_flat(torch.cat(at), tuple(wanted), *shape), torch.cat(found)


def _largest_of_each(entries: Tensor, wanted: list[int]) -> Sequence[Tensor]:
    """Of every member's entries (m, size) the indices of the largest ones, as `largest`."""
    ks = [min(k, entries.shape[1]) for k in wanted]
    if entries.is_cuda and len(set(ks)) == 1:
        return entries.topk(ks[0], sorted=False).indices.unbind()
    return [largest(of_one, k) for of_one, k in zip(entries, ks, strict=True)]


def _revive(p: Parameters, batch: Tensor, error: Tensor, members: list[Settings]) -> Tensor:
    """(m,) SAELens' auxiliary loss: the dead features with the largest pre-activations reconstruct
    what is left over. Only their columns are computed."""
    losses = [error.new_zeros(()) for _ in members]
    if any(member.dead is not None for member in members):
        W_enc, W_dec, b_enc, b_dec = (p[name].unbind() for name in _NAMES)
        for i, member in enumerate(members):
            if member.dead is None:
                continue
            half, places = batch.shape[-1] // 2, len(member.dead)
            there, dead = member.dead >= 0, member.dead.clamp_min(0)
            W = W_dec[i].index_select(0, dead)
            norms = W.norm(dim=-1)
            hidden = products.matmul(batch[i] - b_dec[i], W_enc[i].index_select(1, dead))
            acts = calculate_topk_aux_acts(
                k_aux=min(half, places),
                hidden_pre=(hidden + b_enc[i].index_select(0, dead)) * norms,
                dead_neuron_mask=there,
            )
            acts = acts.where(there, 0)  # of fewer dead ones than places, the others are −∞
            missed = products.matmul(acts / norms, W) + error[i].detach()
            missed = missed.pow(2).sum(-1).mean()
            losses[i] = (there.sum() / half).clamp_max(1) * missed
    return torch.stack(losses)


_NAMES = ("W_enc", "W_dec", "b_enc", "b_dec")
