"""The largest entries against a sort, by either way."""

from __future__ import annotations

import pytest
import torch

from raysae.training import largest as module
from raysae.training.largest import largest, largest_of_rows


@pytest.fixture(params=["by sorts", "by topk"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(module, "_sorts_fast", lambda x: request.param == "by sorts" and x.is_cpu)
    return str(request.param)


both_ways = pytest.mark.usefixtures("way")


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@both_ways
@pytest.mark.parametrize(
    ("size", "k"), [(4096, 8), (4096, 64), (1000, 5), (997, 3), (64, 64), (4096, 1)]
)
def test_those_of_a_batch_are_those_of_a_sort(size, k):
    x = draw(size)
    assert torch.equal(largest(x, k), x.argsort(descending=True)[:k].sort().values)


@both_ways
@pytest.mark.parametrize(
    ("d", "k"), [(512, 8), (4096, 32), (768, 16), (1000, 5), (997, 3), (40, 40), (16384, 1)]
)
def test_those_of_rows_are_those_of_a_sort(d, k):
    x = draw(20, d)
    x[::2] -= 10  # rows without a positive entry
    expected = x.argsort(1, descending=True)[:, :k]
    assert torch.equal(largest_of_rows(x, k).sort(1).values, expected.sort(1).values)


@both_ways
def test_of_equal_ones_distinct_and_no_smaller_ones_are_taken():
    x = (torch.arange(4096) % 7).float()
    chosen = largest(x, 600)
    assert len(chosen.unique()) == 600
    assert x[chosen].sort().values.equal(x.sort().values[-600:])
    of_rows = largest_of_rows(x.view(8, 512), 100)
    for row, of_row in zip(x.view(8, 512), of_rows, strict=True):
        assert len(of_row.unique()) == 100
        assert row[of_row].sort().values.equal(row.sort().values[-100:])


@both_ways
@pytest.mark.parametrize("nan", [float("nan"), -float("nan")])
@pytest.mark.parametrize("d", [64, 512])
def test_nan_is_the_largest(nan, d):
    """Or a loss that is none would go unseen."""
    x = draw(4, d)
    x[2, 5] = nan
    assert 5 in largest_of_rows(x, 4)[2]
    assert 2 * d + 5 in largest(x.flatten(), 4)
    x[:] = nan
    assert [len(row.unique()) for row in largest_of_rows(x, 4)] == [4] * 4
    assert len(largest(x.flatten(), 4).unique()) == 4


@both_ways
def test_infinities_have_their_place():
    x = draw(4, 512)
    x[:, 7], x[:, 9] = torch.inf, -torch.inf
    assert (largest_of_rows(x, 8) == 7).any(1).all()
    assert not (largest_of_rows(x, 511) == 9).any()
    assert 9 not in largest(x[0], 511)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_in_other_types(dtype):
    x = draw(6, 512).to(dtype)
    values = x.gather(1, largest_of_rows(x, 8)).sort(1).values
    assert torch.equal(values, x.sort(1).values[:, -8:])
    flat = x.flatten()
    assert torch.equal(flat[largest(flat, 8)].sort().values, flat.sort().values[-8:])
