"""The compiled steps of layers against the same in float64, written out."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import Tensor

from raysae.unlearning import compiled

SOURCE = Path(compiled.__file__).with_name("layers.c")
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
COMPILER = (sysconfig.get_config_var("CC") or "cc").split()[0]

needs_compiler = pytest.mark.skipif(not shutil.which(COMPILER), reason=f"there is no {COMPILER}")
needs_library = pytest.mark.skipif(
    compiled.library is None, reason="nothing was compiled when raysae was installed"
)
PIECES = {  # positions before, new positions
    "a first piece": (0, 7),
    "one position": (5, 1),
    "behind others": (16, 13),
    "more than there are lanes": (9, 37),
}
HEADS = [(4, 4), (4, 2), (6, 1), (20, 20)]
"""Of queries, of keys."""


@needs_compiler
def test_it_was_compiled_where_there_is_a_compiler_for_this_processor():
    worth_it = compiled.kind_of_processor() in ("AVX2", "AVX512")
    assert (compiled.library is not None) == worth_it
    assert compiled.described() == (
        f"compiled for {compiled.kind_of_processor()}" if worth_it else "PyTorch"
    )


@needs_library
@pytest.mark.skipif(
    compiled.kind_of_processor() != "AVX512", reason="this processor has AVX2 and no more"
)
def test_what_is_compiled_for_an_older_processor_is_right_too():
    """The tests of this file once more, with that."""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    code = "from raysae.unlearning import compiled; print(compiled.described())"
    described = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert described.stdout.strip() == "compiled for AVX2"
    tests = "attention or interventions or digits or normed"
    options = ["-o", "addopts=", "-p", "no:cacheprovider", "-k", tests]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, __file__],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"[0-9]{2,} passed", done.stdout) and "skipped" not in done.stdout


def test_sizes_and_types_that_nothing_is_compiled_for_are_pytorch_s():
    one = torch.zeros(1)
    assert [compiled.serves_heads(size) for size in (8, 32, 48, 256, 512)] == [
        False, True, False, True, False,
    ]  # fmt: skip
    assert not compiled.is_usable(48, one)
    assert not compiled.is_usable(32, one, one.double())
    assert not compiled.is_usable(32, one.to("meta"))
    assert compiled.is_usable(32, one, one) == (compiled.library is not None)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def turn(positions: int, d_head: int) -> Tensor:
    """complex (positions, d_head / 2), each pair at a pace of its own."""
    pace = 100.0 ** -torch.linspace(0, 1, d_head // 2, dtype=torch.float64)
    angles = torch.arange(positions)[:, None] * pace
    return torch.polar(torch.ones_like(angles), angles)


def turned(x: Tensor, positions: Tensor) -> Tensor:
    """(…, positions, heads, d_head) in float64, neighbours as complex numbers."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    turns = turn(int(positions.max()) + 1, x.shape[-1])[positions]
    return torch.view_as_real(pairs * turns[..., None, :]).flatten(-2)


def weights(
    queries: Tensor, keys: Tensor, positions: Tensor, cap: float, window: int | None
) -> Tensor:
    """(rows, heads, queries, keys) of float64 (rows, heads, …, d_head), `positions` of queries."""
    scores = cap * torch.tanh(queries @ keys.mT)
    distance = positions[..., None] - torch.arange(keys.shape[2])
    hidden = (distance < 0) | (distance >= (window or torch.inf))
    return scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)


@needs_library
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("piece", PIECES.values(), ids=PIECES)
def test_attention(
    piece: tuple[int, int], heads: tuple[int, int], window: int | None, threads: int
):
    (first, n), (heads_, kv_heads), rows, d_head, cap = piece, heads, 40, 32, 30.0
    projected = random(rows, n, heads_ + 2 * kv_heads, d_head) * 0.3
    past = random(7, kv_heads, 2, first, d_head, seed=1) if first else None
    parents = torch.randint(7, (rows,)).sort().values if first else torch.arange(rows)
    turns = compiled.Turns(turn(200, d_head).to(torch.complex64))
    before, at_once = projected.clone(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        mixed, longer = compiled.attend(
            projected, past, parents, turns, heads_, cap, window, keep=True
        )
        again, nothing = compiled.attend(
            projected, past, parents, turns, heads_, cap, window, keep=False
        )
    finally:
        torch.set_num_threads(at_once)
    assert nothing is None
    assert torch.equal(again, mixed)
    assert torch.equal(projected, before)

    positions = torch.arange(first, first + n)
    q, k, v = projected.double().split([heads_, kv_heads, kv_heads], dim=2)
    q, k = turned(q, positions).transpose(1, 2), turned(k, positions).transpose(1, 2)
    v = v.transpose(1, 2)
    if past is not None:
        k = torch.cat([past[parents, :, 0], k], dim=2)
        v = torch.cat([past[parents, :, 1], v], dim=2)
    group = heads_ // kv_heads
    shares = weights(q, k.repeat_interleave(group, 1), positions, cap, window)
    exact = (shares @ v.repeat_interleave(group, 1)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mixed.double(), exact, rtol=0, atol=3e-5)
    torch.testing.assert_close(longer, torch.stack([k, v], dim=2).float(), rtol=0, atol=3e-7)


@needs_library
@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("piece", PIECES.values(), ids=PIECES)
def test_attention_of_one_position(
    piece: tuple[int, int], heads: tuple[int, int], window: int | None
):
    (first, n), (heads_, kv_heads), rows, d_head, d_model, cap = piece, heads, 40, 32, 96, 30.0
    queries, keys = random(rows, heads_, d_head) * 0.3, random(rows, n, kv_heads, d_head, seed=1)
    normed = random(rows, n, d_model, seed=2)
    past = None
    if first:
        past = random(7, kv_heads, first, d_head, seed=3), random(7, first, d_model, seed=4)
    parents = torch.randint(7, (rows,)) if first else torch.arange(rows)
    at = torch.randint(n, (rows,))
    turns = compiled.Turns(turn(200, d_head).to(torch.complex64))
    mixed = compiled.attend_once(queries, keys, normed, past, parents, at, turns, cap, window)

    q = turned(queries[:, None], first + at[:, None]).transpose(1, 2)
    k = turned(keys, torch.arange(first, first + n)).transpose(1, 2)
    v = normed.double()
    if past is not None:
        k, v = torch.cat([past[0][parents], k], dim=2), torch.cat([past[1][parents], v], dim=1)
    position = (first + at)[:, None, None]
    shares = weights(q, k.repeat_interleave(heads_ // kv_heads, 1), position, cap, window)
    torch.testing.assert_close(mixed.double(), shares[:, :, 0] @ v, rtol=0, atol=3e-5)


@needs_library
@pytest.mark.parametrize("size", [1e-7, 1e-3, 1.0, 1e4])
def test_scores_of_every_size_keep_their_digits(size: float):
    """A small one is its own hyperbolic tangent, and one beyond all bounds is the cap."""
    rows, n, d_head, cap = 16, 12, 32, 50.0
    queries, keys = random(rows, 1, d_head) * size, random(rows, n, 1, d_head, seed=1)
    values = torch.eye(n, d_head).expand(rows, n, d_head)
    turns = compiled.Turns(torch.ones(n, d_head // 2, dtype=torch.complex64))
    last = torch.full((rows,), n - 1)
    mixed = compiled.attend_once(queries, keys, values, None, last, last, turns, cap, None)
    q, k = queries.double()[:, :, None], keys.double().transpose(1, 2)
    exact = weights(q, k, last[:, None, None], cap, None)[:, :, 0]
    # float32 rounds a score of `size` to 6e-8 of it, in units of the cap.
    tolerance = 3e-6 * max(1.0, min(size, 1.0) * cap)
    torch.testing.assert_close(mixed[..., :n].double(), exact, rtol=tolerance, atol=1e-12)


@needs_library
@pytest.mark.parametrize("rows", [1, 40])
def test_interventions(rows: int):
    """What is chosen and fires is set to the target, along its decoder row, and nothing else."""
    prompts, length, features, d_model, start, n = 9, 12, 5, 64, 3, 6
    resid, acts = random(prompts, length, d_model), random(prompts, length, features, seed=1).relu()
    of_row = torch.randint(prompts, (rows,))
    chosen = random(rows, features, seed=2) > 0
    directions = random(features, d_model, seed=3)
    fires = (acts[of_row, start : start + n] > 0) & chosen[:, None]
    targets = -25.0 * fires.any(dim=-1)
    assert rows == 1 or 0 < (targets == 0).float().mean() < 1
    before = resid.clone()
    found = compiled.intervene(resid, acts, of_row, start, chosen, targets, directions)
    assert torch.equal(resid, before)

    exact = resid[of_row, start : start + n].double()
    z = acts[of_row, start : start + n].double()
    exact += torch.where(fires, targets[..., None] - z, 0.0) @ directions.double()
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-4)
    same = targets == 0
    assert torch.equal(found[same], resid[of_row, start : start + n][same])


@needs_library
@pytest.mark.parametrize("rows", [1, 50])
def test_residual_stream_with_a_normed_update(rows: int):
    resid, update, weight, eps = random(rows, 3, 96), random(rows, 3, 96, seed=1), random(96), 1e-3
    exact = resid.double() + weight.double() * torch.nn.functional.rms_norm(
        update.double(), (96,), eps=eps
    )
    before = resid.clone()
    # A view with gaps, as callers hand it in.
    wide = torch.cat([resid, resid], dim=1)[:, :3]
    found, normed = compiled.add_normed(wide, update, weight, eps)
    assert found is update
    assert torch.equal(wide, before)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-6)
    norm = torch.nn.functional.rms_norm(exact, (96,), eps=eps)
    torch.testing.assert_close(normed.double(), norm, rtol=0, atol=1e-6)


@needs_library
def test_turns_are_made_as_far_as_they_are_asked_for():
    turns = compiled.Turns(turn(100, 32).to(torch.complex64))
    few = turns.tables(10)
    assert few.shape[1] < 100
    many = turns.tables(90)
    assert torch.equal(many[:, : few.shape[1]], few)
    assert torch.equal(many[0, :, ::2], turn(100, 32).real.float())


def test_without_what_was_compiled_there_is_nothing_to_load(tmp_path: Path):
    assert compiled.load(tmp_path, "AVX2") is None


@needs_compiler
def test_what_was_compiled_for_another_version_is_left_alone(tmp_path: Path):
    source = SOURCE.read_text().replace("layers_version = ", "layers_version = 1000 + ")
    (tmp_path / "layers.c").write_text(source)
    made = tmp_path / f"_layers_avx2{SUFFIX}"
    subprocess.run(
        [COMPILER, "-DLANES=8", "-w", "-shared", "-fPIC", "layers.c", "-o", str(made)],
        cwd=tmp_path,
        check=True,
    )
    with pytest.warns(UserWarning, match="another version of raysae.*setup.sh"):
        assert compiled.load(tmp_path, "AVX2") is None


def test_a_file_that_is_no_library_is_told(tmp_path: Path):
    (tmp_path / f"_layers_avx2{SUFFIX}").write_text("not a library")
    with pytest.warns(UserWarning, match="cannot be used"):
        assert compiled.load(tmp_path, "AVX2") is None
