"""Products against float64, by either library, and who makes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from raysae import products

with_onednn = pytest.mark.skipif(
    not products._has_onednn(), reason="this PyTorch was built without oneDNN's linear layer"
)
SHAPES = {
    "large enough": (128, 96, 160),
    "few rows": (2, 1024, 4096),
    "one column": (1024, 4096, 1),
    "small": (16, 16, 16),
    "empty": (0, 64, 64),
}


@pytest.fixture(params=["mkl", pytest.param("onednn", marks=with_onednn)])
def library(request: pytest.FixtureRequest) -> products.Library:
    return request.param


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what oneDNN is asked for."""
    found: list[tuple[int, ...]] = []
    own = products._onednn

    def ask(x: Tensor, weight: Tensor, *rest: object) -> Tensor:
        found.append((*x.shape, len(weight)))
        return own(x, weight, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(products, "_onednn", ask)
    return found


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True)])
def test_products_are_those_of_float64(
    library: products.Library, shape: tuple[int, int, int], transposed: tuple[bool, bool]
):
    m, k, n = shape
    left = random(k, m).T if transposed[0] else random(m, k)
    right = random(n, k, seed=1).T if transposed[1] else random(k, n, seed=1)
    with products.made_by(library):
        found = products.matmul(left, right)
    torch.testing.assert_close(found.double(), left.double() @ right.double(), rtol=0, atol=1e-3)


def test_leading_axes_and_stacks(library: products.Library):
    x, W = random(3, 40, 96), random(96, 160, seed=1)
    stack = random(3, 96, 160, seed=2)
    with products.made_by(library):
        torch.testing.assert_close(products.matmul(x, W), x @ W)
        torch.testing.assert_close(products.matmul(x, stack), x @ stack)
        torch.testing.assert_close(products.matmul(x[:1], stack[:1]), x[:1] @ stack[:1])


@with_onednn
@pytest.mark.parametrize("shape", [(96, 3000, 160), (96, 1100, 160)], ids=["odd", "two parts"])
def test_a_long_inner_axis_of_a_transposed_operand_is_taken_by_parts(
    shape: tuple[int, int, int], asked: list[tuple[int, ...]]
):
    m, k, n = shape
    left, right = random(k, m).T, random(k, n, seed=1)
    with products.made_by("onednn"):
        found = products.matmul(left, right)
        laid_out = products.matmul(left.contiguous(), right)
    *parts, whole = asked
    assert len(parts) > 1
    assert sum(part[1] for part in parts) == k
    assert whole == (m, k, n)
    for product in (found, laid_out):
        torch.testing.assert_close(
            product.double(), left.double() @ right.double(), rtol=0, atol=1e-3
        )


def test_a_bias_is_added_to_every_member(library: products.Library):
    left, right, bias = random(3, 100, 96), random(3, 96, 160, seed=1), random(3, 160, seed=2)
    exact = left.double() @ right.double() + bias.double()[:, None]
    with products.made_by(library):
        found = products.affine(bias, left, right)
        alone = products.affine(bias[1:2], left[1:2], right[1:2])
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-4)
    torch.testing.assert_close(alone.double(), exact[1:2], rtol=0, atol=1e-4)
    if library == "onednn":
        assert torch.equal(alone[0], found[1])


@with_onednn
def test_members_of_a_stack_round_as_each_alone():
    left, right = random(3, 100, 96), random(3, 96, 160, seed=1)
    with products.made_by("onednn"):
        together = products.matmul(left, right)
        alone = [products.matmul(a, b) for a, b in zip(left, right, strict=True)]
        of_one = [
            products.matmul(a, b)[0] for a, b in zip(left.split(1), right.split(1), strict=True)
        ]
    assert torch.equal(together, torch.stack(alone))
    assert torch.equal(together, torch.stack(of_one))


@pytest.mark.parametrize(
    ("left", "right"),
    [((100, 96), (96, 160)), ((3, 40, 96), (96, 160)), ((3, 100, 96), (3, 96, 160))],
)
def test_gradients_are_those_of_float64(
    library: products.Library, left: tuple[int, ...], right: tuple[int, ...]
):
    a, b = random(*left).requires_grad_(), random(*right, seed=1).requires_grad_()
    weights = random(*left[:-1], right[-1], seed=2)
    exact = [t.detach().double().requires_grad_() for t in (a, b)]
    with products.made_by(library):
        (products.matmul(a, b) * weights).sum().backward()
    ((exact[0] @ exact[1]) * weights.double()).sum().backward()
    for t, of in zip((a, b), exact, strict=True):
        assert t.grad is not None and of.grad is not None
        torch.testing.assert_close(t.grad.double(), of.grad, rtol=0, atol=1e-3)


def test_a_layer_with_and_without_bias(library: products.Library):
    x, W, bias = random(4, 40, 96), random(160, 96, seed=1), random(160, seed=2)
    y = F.linear(x.double(), W.double())
    with products.made_by(library):
        plain, biased = products.linear(x, W), products.linear(x, W, bias)
    torch.testing.assert_close(plain.double(), y, rtol=0, atol=1e-4)
    torch.testing.assert_close(biased.double(), y + bias.double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(4, 40), (3,), (0, 5)], ids=["pieces", "few rows", "empty"])
@pytest.mark.parametrize("size", [(160, 96), (160, 5)], ids=["", "few columns"])
def test_a_layer_that_stays_the_same(
    library: products.Library, shape: tuple[int, ...], size: tuple[int, int]
):
    x, W, bias = random(*shape, size[1]), random(*size, seed=1), random(size[0], seed=2)
    other = random(*shape, size[0], seed=3)
    before = other.clone()
    with products.made_by(library):
        fixed = products.FixedWeight(W)
        plain, of_view = fixed.linear(x), products.FixedWeight(W.T.contiguous().T).linear(x)
        found = [fixed.linear(x, bias), fixed.gelu(x), fixed.times(x, other)]
        if x.numel() * len(W) >= products.LEAST_WORK:
            assert torch.equal(plain, products.linear(x, W))
    y = F.linear(x.double(), W.double())
    exact = [y + bias.double(), F.gelu(y, approximate="tanh"), y * other.double()]
    for mine, right in zip([plain, of_view, *found], [y, y, *exact], strict=True):
        assert mine.shape == (*shape, size[0])
        torch.testing.assert_close(mine.double(), right, rtol=0, atol=1e-4)
    assert torch.equal(other, before)


@with_onednn
def test_a_layer_keeps_the_library_that_it_was_made_for(asked: list[tuple[int, ...]]):
    x, W = random(128, 96), random(160, 96, seed=1)
    with products.made_by("mkl"):
        fixed = products.FixedWeight(W)
    with products.made_by("onednn"):
        of_onednn, of_another_type = products.FixedWeight(W), products.FixedWeight(W.double())
        assert torch.equal(fixed.linear(x), F.linear(x, W))
        assert torch.equal(of_another_type.linear(x.double()), F.linear(x.double(), W.double()))
    assert asked == []
    with products.made_by("mkl"):
        of_onednn.linear(x)
    assert asked == [(128, 96, 160)]


def test_a_layer_passes_gradients(library: products.Library):
    x, W, bias = random(80, 96).requires_grad_(), random(160, 96, seed=1), random(160, seed=2)
    with products.made_by(library):
        products.linear(x, W, bias).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, W.sum(0).expand(80, -1), rtol=0, atol=1e-3)


@with_onednn
def test_what_is_small_or_of_another_type_is_pytorch_s(asked: list[tuple[int, ...]]):
    with products.made_by("onednn"):
        for m, k, n in (SHAPES["few rows"], SHAPES["one column"], SHAPES["small"]):
            products.matmul(random(m, k), random(k, n))
        products.matmul(random(128, 96).double(), random(96, 160).double())
        with torch.autocast("cpu", torch.bfloat16):
            assert products.matmul(random(128, 96), random(96, 160)).dtype == torch.bfloat16
        assert asked == []
        products.matmul(random(128, 96), random(96, 160))
    assert asked == [(128, 96, 160)]
    with products.made_by("mkl"):
        products.matmul(random(128, 96), random(96, 160))
    assert len(asked) == 1


@with_onednn
def test_products_of_other_libraries_modules(asked: list[tuple[int, ...]]):
    layer = torch.nn.Linear(96, 160)
    x, W = random(128, 96), random(96, 160, seed=1)
    expected = (layer(x).detach(), x @ W, torch.relu(x))
    with products.made_by("onednn"), products.preferred(), torch.no_grad():
        found = (layer(x), x @ W, torch.relu(x))
    assert asked == [(128, 96, 160)] * 2
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    with products.made_by("onednn"), torch.no_grad():
        layer(x)
    assert len(asked) == 2, "the preference ends with its block"


@with_onednn
@pytest.mark.parametrize(
    ("capability", "vendor", "expected"),
    [
        ("AVX512", "AuthenticAMD", "onednn"),
        ("AVX512", "GenuineIntel", "mkl"),
        ("AVX2", "AuthenticAMD", "mkl"),
    ],
)
def test_the_library_follows_from_the_processor(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capability: str,
    vendor: str,
    expected: products.Library,
):
    described = tmp_path / "cpuinfo"
    described.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr(products, "CPU_INFO", described)
    monkeypatch.setattr(products, "_library", None)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(products.platform, "processor", lambda: "x86_64")
    assert products.library() == expected


def test_another_layer_of_that_name_is_not_used(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(products, "_ARGUMENTS", ["X", "W"])
    with pytest.raises(RuntimeError, match="oneDNN"), products.made_by("onednn"):
        pass
