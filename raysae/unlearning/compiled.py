"""What layers.c computes, on float32 tensors on a CPU: interventions, and attention and norms of
Gemma-2-shaped layers.

Compiled when raysae is installed, if there is a compiler, for processors with AVX-512 or AVX2.
Elsewhere nothing here is usable, and whoever would call it asks PyTorch, for the same to rounding.
PyTorch's way makes a matrix of every step, and a copy of all keys and values of a row for each
intervention on it.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

_LANES = 16
"""Of a vector, at most."""
_SIZES = 2 * _LANES
"""Of heads and of the residual stream: multiples of this one."""
_LARGEST_HEAD = 256
_ROWS_OF_A_THREAD = 16
"""Fewer are not worth waking one."""
_VERSION = 1
"""Of what the arguments mean, in layers.c too."""


def kind_of_processor() -> str:
    """As PyTorch names it, such as AVX2 or AVX512."""
    return torch.backends.cpu.get_cpu_capability().split("_")[0]


def load(folder: Path, processor: str) -> ctypes.CDLL | None:
    """What was compiled into that folder for that kind of processor.

    None where nothing was, and, with a warning, where it cannot be used here.
    """
    names = (f"_layers_{processor.lower()}{suffix}" for suffix in EXTENSION_SUFFIXES)
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        return None
    try:
        library = ctypes.CDLL(str(file))
        version = ctypes.c_int32.in_dll(library, "layers_version").value
    except (OSError, ValueError) as error:
        warnings.warn(f"{file} cannot be used: {error}", stacklevel=2)
        return None
    if version != _VERSION:
        warnings.warn(
            f"{file} is of another version of raysae ({version}, not {_VERSION}): run setup.sh or "
            "pip install again; until then scores take longer",
            stacklevel=2,
        )
        return None
    return library


library = load(Path(__file__).parent, kind_of_processor())


def described() -> str:
    """Who computes all this here."""
    return "PyTorch" if library is None else f"compiled for {kind_of_processor()}"


def is_usable(d_model: int, *like: Tensor) -> bool:
    """Whether there is something compiled, and for tensors like these and a stream of that size."""
    return (
        library is not None
        and d_model % _SIZES == 0
        and all(tensor.is_cpu and tensor.dtype == torch.float32 for tensor in like)
    )


def serves_heads(d_head: int) -> bool:
    """Whether attention with heads of this size is among it."""
    return d_head % _SIZES == 0 and d_head <= _LARGEST_HEAD


def intervene(
    resid: Tensor,
    acts: Tensor,
    prompts: Tensor,
    start: int,
    chosen: Tensor,
    targets: Tensor,
    directions: Tensor,
) -> Tensor:
    """The residual stream after interventions: (rows, positions, d_model).

    Args:
        resid: (prompts, length, d_model) without one, not written into.
        acts: (prompts, length, features).
        prompts: int64 (rows,) of which each one is.
        start: where its positions begin in the prompt.
        chosen: bool (rows, features) what is clamped where it fires.
        targets: (rows, positions) to what; 0 where nothing is.
        directions: (features, d_model) decoder rows.
    """
    (rows, n), (_, length, d_model) = targets.shape, resid.shape
    resid, acts, directions = resid.contiguous(), acts.contiguous(), directions.contiguous()
    changed = resid.new_empty(rows, n, d_model)

    def run(low: int, high: int) -> None:
        _call("intervene")(
            *map(ctypes.c_int64, (high - low, n, d_model, acts.shape[-1], length, start)),
            _at(resid), _at(acts), _at(prompts, low), _at(chosen, low), _at(targets, low),
            _at(directions), _at(changed, low),
        )  # fmt: skip

    _by_threads(run, rows)
    return changed


class Turns:
    """Rotary positions, of neighbours that are turned together."""

    def __init__(self, turn: Tensor) -> None:
        """`turn`: complex (positions, d_head / 2)."""
        self._turn = turn
        self._tables = turn.new_empty(2, 0, 2 * turn.shape[1], dtype=torch.float32)

    def tables(self, positions: int) -> Tensor:
        """(2, at least so many positions, d_head): cosines, and sines, the first of two negative.

        A model has many more positions than a prompt: only what was asked for is kept.
        """
        if self._tables.shape[1] < positions:
            turn = self._turn[: 2 * positions]
            cosines = turn.real.repeat_interleave(2, dim=-1)
            sines = torch.stack([-turn.imag, turn.imag], dim=-1).flatten(-2)
            self._tables = torch.stack([cosines, sines])
        return self._tables


def attend(
    projected: Tensor,
    past: Tensor | None,
    parents: Tensor,
    turns: Turns,
    heads: int,
    cap: float,
    window: int | None,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """Causal attention of new positions to those before and to each other, with capped scores.

    Args:
        projected: (rows, positions, heads + 2 · kv heads, d_head) queries, keys and values, not
            turned; queries divided by the cap and the attention's scale.
        past: (rows before, kv heads, 2, positions before, d_head) keys, turned, and values.
        parents: int64 (rows,) which of the past's rows each one goes on from.
        turns: of all positions.
        heads: number of queries'.
        cap: of the scores.
        window: of positions that a query sees; None: all.
        keep: whether keys and values are asked for.

    Returns:
        (rows, positions, heads · d_head), and keys and values of all positions, as `past`.
    """
    rows, n, all_heads, d_head = projected.shape
    kv_heads = (all_heads - heads) // 2
    first = 0 if past is None else past.shape[-2]
    projected = projected.contiguous()
    mixed = projected.new_empty(rows, n, heads * d_head)
    longer = projected.new_empty(rows, kv_heads, 2, first + n, d_head) if keep else None
    cosines, sines = turns.tables(first + n)

    def run(low: int, high: int) -> None:
        scratch = projected.new_empty((first + n) * _LANES + n * d_head)
        _call("attend")(
            *map(ctypes.c_int64, (high - low, n, first, heads, kv_heads, d_head)),
            _at(projected, low), _at(cosines), _at(sines), _at(past),
            _at(parents, low), ctypes.c_float(cap), ctypes.c_int64(window or 0),
            _at(longer, low), _at(scratch), _at(mixed, low),
        )  # fmt: skip

    _by_threads(run, rows)
    return mixed, longer


def attend_once(
    queries: Tensor,
    keys: Tensor,
    normed: Tensor,
    past: tuple[Tensor, Tensor] | None,
    parents: Tensor,
    at: Tensor,
    turns: Turns,
    cap: float,
    window: int | None,
) -> Tensor:
    """What one position of a row sees of the normed residual stream: (rows, heads, d_model).

    Args:
        queries: (rows, heads, d_head), not turned; divided as above.
        keys: (rows, positions, kv heads, d_head) of new positions, not turned.
        normed: (rows, positions, d_model).
        past: (rows before, kv heads, positions before, d_head) keys, turned, and (rows before,
            positions before, d_model).
        parents: int64 (rows,).
        at: int64 (rows,) which of the new positions asks.
        turns: of all positions.
        cap: of the scores.
        window: as above.
    """
    rows, n, kv_heads, d_head = keys.shape
    heads, d_model = queries.shape[1], normed.shape[-1]
    past_keys, past_normed = past or (None, None)
    first = 0 if past_keys is None else past_keys.shape[-2]
    queries, keys, normed = queries.contiguous(), keys.contiguous(), normed.contiguous()
    mixed = queries.new_empty(rows, heads, d_model)
    cosines, sines = turns.tables(first + n)

    def run(low: int, high: int) -> None:
        scratch = queries.new_empty((first + n) * _LANES + n * d_head)
        _call("attend_once")(
            *map(ctypes.c_int64, (high - low, n, first, heads, kv_heads, d_head, d_model)),
            _at(queries, low), _at(keys, low), _at(normed, low), _at(cosines),
            _at(sines), _at(past_keys), _at(past_normed), _at(parents, low), _at(at, low),
            ctypes.c_float(cap), ctypes.c_int64(window or 0), _at(scratch), _at(mixed, low),
        )  # fmt: skip

    _by_threads(run, rows)
    return mixed


def add_normed(resid: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """resid + weight · RMS norm(update), which takes the memory of `update`, and its own norm.

    Of (…, d_model) and (d_model,); the norms are without a weight.
    """
    size = resid.shape[-1]
    resid = resid.contiguous()
    normed = torch.empty_like(resid)
    flat = resid.view(-1, size), update.view(-1, size), normed.view(-1, size)

    def run(low: int, high: int) -> None:
        r, u, x = flat
        _call("add_normed")(
            ctypes.c_int64(high - low), ctypes.c_int64(size), ctypes.c_float(eps), _at(r, low),
            _at(weight), _at(u, low), _at(x, low),
        )  # fmt: skip

    _by_threads(run, len(flat[0]))
    return update, normed


def _call(name: str) -> Callable[..., None]:
    assert library is not None
    function: Callable[..., None] = getattr(library, name)
    return function


def _at(tensor: Tensor | None, row: int = 0) -> ctypes.c_void_p:
    """Where a row of a contiguous tensor begins."""
    if tensor is None:
        return ctypes.c_void_p(None)
    return ctypes.c_void_p(tensor.data_ptr() + row * tensor.stride(0) * tensor.element_size())


def _by_threads(run: Callable[[int, int], None], rows: int) -> None:
    """Rows `low` to `high` by each of PyTorch's number of threads; C holds no lock of Python's."""
    threads = min(torch.get_num_threads(), rows // _ROWS_OF_A_THREAD)
    if threads <= 1:
        return run(0, rows)
    bounds = [rows * i // threads for i in range(threads + 1)]
    list(_threads(torch.get_num_threads()).map(run, bounds[:-1], bounds[1:]))
    return None


@lru_cache(1)
def _threads(number: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(number, thread_name_prefix="layers")
