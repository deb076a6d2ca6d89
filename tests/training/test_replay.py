"""Steps that are replayed on a GPU: which may be, and that they are the steps they stand for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from training_bench import ARCHITECTURES, METHODS, PAIRS, REFUSED, doubled, small

from raysae.training import pack as pack_module
from raysae.training import stacked
from raysae.training.pack import Pack
from raysae.training.run import SAERun
from raysae.training.schedules import Dynamic
from raysae.training.spec import TrialSpec

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
every_pair = pytest.mark.parametrize(("regularizer", "architecture"), PAIRS)


class Operations(TorchDispatchMode):
    """Writes down which operations are asked for, on which shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        shapes = tuple(tuple(a.shape) if isinstance(a, Tensor) else None for a in args)
        self.seen.append((str(function), shapes))
        return function(*args, **(kwargs or {}))


def largest_by_topk(x: Tensor, k: int) -> Tensor:
    """As on a GPU, which is asked the same whatever the numbers; ascending, as on a CPU."""
    return x.topk(k, sorted=False).indices.sort().values


def kinds(pack: Pack) -> tuple[str | None, ...]:
    return tuple(run.spec.regularizer.kind(run.step) for run in pack.runs)


@pytest.mark.parametrize("regularizer", METHODS)
@pytest.mark.parametrize("architecture", ["standard", "batchtopk"])
def test_steps_of_one_kind_ask_the_same_of_the_device(
    regularizer, architecture, make_spec, make_store, monkeypatch
):
    """All of them but the first, until an update of groups."""
    if (regularizer, architecture) in REFUSED:
        return
    monkeypatch.setattr(stacked, "SPARSE", 0.0)  # what a CPU does with few activations
    monkeypatch.setattr(stacked, "largest", largest_by_topk)
    parameters = small(regularizer)
    if "group_update_period" in parameters:
        parameters["group_update_period"] = 20  # more than one observation in between
    spec = make_spec(architecture, regularizer, parameters, steps=44, dead_after=100)
    store = make_store()
    pack = Pack([SAERun(m, store) for m in spec.model_copy(update={"seeds": 2}).members()])
    step: Callable[..., Any] = pack._step
    asked: list[tuple[Any, ...]] = []

    def watched(*arguments: Any) -> dict[str, Tensor]:
        with Operations() as operations:
            losses = step(*arguments)
        asked.append(tuple(operations.seen))
        return losses

    monkeypatch.setattr(pack, "_step", watched)
    found: dict[Any, list[int]] = {}
    of_kind: set[Any] = set()
    for at in range(44):
        kind = kinds(pack)
        pack.advance()
        if None in kind:
            found.clear()
            continue
        found.setdefault(kind, []).append(at)
        second = found[kind][1:2]
        if second:
            of_kind.add(kind)
            assert asked[at] == asked[second[0]], kind
    assert of_kind == {(kind, kind) for kind in KINDS.get(regularizer, {"plain"})}


@pytest.mark.parametrize("architecture", stacked.PICKING)
def test_steps_with_dead_features_do_so_too(architecture, make_spec, make_store, monkeypatch):
    """Those with places for equally many."""
    monkeypatch.setattr(stacked, "largest", largest_by_topk)
    spec = make_spec(architecture, sparsity=1, batch_size=8, dead_after=4, steps=40)
    runs = [SAERun(m, make_store()) for m in spec.model_copy(update={"seeds": 2}).members()]
    pack = Pack(runs)
    (stack,) = pack._stacks
    stack._look_ahead = 7  # as on a GPU
    step: Callable[..., Any] = pack._step
    asked: dict[tuple[int, ...], list[list[Any]]] = {}

    def watched(*arguments: Any) -> dict[str, Tensor]:
        with Operations() as operations:
            losses = step(*arguments)
        asked.setdefault(stack.places, []).append(operations.seen)
        return losses

    monkeypatch.setattr(pack, "_step", watched)
    for _ in range(40):
        pack.advance()
    assert sum(places != (0, 0) for places in asked) >= 1
    for places, steps in asked.items():
        assert all(seen == steps[1] for seen in steps[2:]), places


OBSERVING = ("adaptive_orthogonal", "grouped", "hierarchical", "subspace_clustered")
KINDS = {name: {"plain", "observed"} for name in (*OBSERVING, "gradient_disentangled")}


class Direct:
    """In the place of `Replay`: every step as it is."""

    def __call__(self, kind: Any, step: Any, arguments: Sequence[Tensor]) -> dict[str, Tensor]:
        return step(*arguments)

    def forget(self) -> None:
        pass


def spec_of(make_spec: Any, regularizer: str, architecture: str, **more: Any) -> TrialSpec:
    """Two seeds; on most methods' way one update of groups with several steps on either side."""
    parameters = small(regularizer)
    if "group_update_period" in parameters:
        parameters["group_update_period"] = 9
    options = {"steps": 24, "dead_after": 100, "autocast": "off"} | more
    sparsity = 2 if "topk" in architecture else None
    spec = make_spec(architecture, regularizer, parameters, sparsity=sparsity, **options)
    return spec.model_copy(update={"seeds": 2, "alpha_schedule": Dynamic(every=4)})


def state_of(run: SAERun) -> dict[str, Tensor]:
    tensors = run.sae.state_dict() | run.regularizer_state | vars(run.firing)
    if "bases" in tensors:  # the sign of a singular vector is a matter of rounding
        tensors["bases"] = tensors["bases"].mT @ tensors["bases"]
    return tensors


def assert_same(ours: SAERun, theirs: SAERun) -> None:
    found = state_of(ours)
    for name, tensor in state_of(theirs).items():
        # Which directions lead is decided by small differences where they weigh about the same.
        tolerance = 1e-3 if name == "bases" else 1e-9
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-6, atol=tolerance, msg=lambda text, name=name: name + text
        )


@pytest.mark.gpu
@on_gpu
@every_pair
def test_replayed_steps_are_those_that_are_not(
    regularizer, architecture, make_spec, make_store, monkeypatch
):
    spec, store = spec_of(make_spec, regularizer, architecture), make_store(device="cuda")

    def trained() -> tuple[Pack, list[dict[str, Tensor]]]:
        runs = [doubled(SAERun(member, store, device="cuda")) for member in spec.members()]
        pack = Pack(runs)
        return pack, [pack.advance() for _ in range(24)]

    replayed, ours = trained()
    assert replayed._replay._recorded or spec.regularizer.kind(1) is None
    monkeypatch.setattr(pack_module, "Replay", Direct)
    plain, theirs = trained()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    for a, b in zip(replayed.runs, plain.runs, strict=True):
        assert_same(a, b)


@pytest.mark.gpu
@on_gpu
@every_pair
def test_on_a_gpu_a_member_gets_what_saelens_own_step_gives_there(
    regularizer, architecture, make_spec, make_store
):
    """Features die on the way, and are revived."""
    spec = spec_of(make_spec, regularizer, architecture, dead_after=6)
    store = make_store(device="cuda")
    pack = Pack([doubled(SAERun(m, store, device="cuda")) for m in spec.members()])
    packed = [pack.advance() for _ in range(24)]
    for i, member in enumerate(spec.members()):
        run = doubled(SAERun(member, store, device="cuda"))
        for ours in packed:
            expected = {name: value.item() for name, value in run.advance().items()}
            found = {name: value[i].item() for name, value in ours.items()}
            assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert_same(pack.runs[i], run)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_whole_training_in_bfloat16_ends_near_the_one_in_float32(
    architecture, make_spec, make_store
):
    errors = []
    for autocast in ("off", "auto"):
        spec = spec_of(
            make_spec, "fixed_orthogonal", architecture, steps=200, autocast=autocast, lr=1e-3
        )
        store = make_store(device="cuda")
        pack = Pack([SAERun(member, store, device="cuda") for member in spec.members()])
        for _ in range(200):
            losses = pack.advance()
        errors.append(losses["mse_loss"])
    torch.testing.assert_close(errors[1], errors[0], rtol=0.1, atol=0.0)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("regularizer", METHODS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_between_updates_the_host_does_not_wait_for_the_device(
    regularizer, architecture, make_spec, make_store, monkeypatch
):
    """Steps as they are, not replayed: what waits cannot be recorded either."""
    if (regularizer, architecture) in REFUSED:
        return
    monkeypatch.setattr(pack_module, "Replay", Direct)
    spec, store = spec_of(make_spec, regularizer, architecture), make_store(device="cuda")
    pack = Pack([SAERun(member, store, device="cuda") for member in spec.members()])
    for _ in range(9):
        pack.advance()
    while pack.runs[0].step < 18:
        kind = kinds(pack)
        waits = None in kind or pack.runs[0].spec.alpha_schedule.measures(pack.runs[0].step)
        torch.cuda.set_sync_debug_mode("default" if waits else "error")
        try:
            pack.advance()
        finally:
            torch.cuda.set_sync_debug_mode("default")
