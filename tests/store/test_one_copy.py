"""One copy for several processes: the same memory, and an error once its holder has ended."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from raysae.store import one_copy
from raysae.store.one_copy import CannotShareError, LostCopyError, OneCopy, share

CPU = torch.device("cpu")
SECONDS = 60
"""For another process to answer: it has to import torch first."""


def ask_for(name: str, value: float, declines: bool, mine: Connection) -> None:
    """Another process: asks for the copy, tells what it has, and then does as it is told."""
    torch.multiprocessing.set_sharing_strategy("file_system")

    def place() -> tuple[torch.Tensor, str] | None:
        mine.send("placing")
        mine.recv()
        return None if declines else (torch.full((4, 3), value), f"placed by {os.getpid()}")

    copy = share(name, CPU, place)
    mine.send(None if copy is None else (copy.where, copy.is_own, copy.rows.tolist()))
    while True:
        row = mine.recv()
        assert copy is not None
        copy.rows[row] = -1
        mine.send("written")


class Other:
    """A process that asks for a copy, and the test's end of the wire to it."""

    def __init__(self, name: str, value: float, declines: bool) -> None:
        context = get_context("spawn")
        self.wire, theirs = context.Pipe()
        self.process = context.Process(target=ask_for, args=(name, value, declines, theirs))
        self.process.start()

    def hear(self) -> Any:
        assert self.wire.poll(SECONDS), "the other process does not answer"
        return self.wire.recv()

    def place(self) -> Any:
        """Let it place its copy; what it then has."""
        assert self.hear() == "placing"
        self.wire.send("go on")
        return self.hear()

    def kill(self) -> None:
        self.process.kill()  # SIGKILL
        while self.process.is_alive():  # `join` would wait for torch's manager of shared memory too
            time.sleep(0.01)


@pytest.fixture
def name() -> str:
    return f"test {uuid.uuid4()}"


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What this process has of other tests."""
    monkeypatch.setattr(one_copy, "_COPIES", {})
    strategy = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    yield
    torch.multiprocessing.set_sharing_strategy(strategy)


@pytest.fixture
def start(name: str) -> Iterator[Callable[..., Other]]:
    others = []

    def make(value: float = 0.5, *, declines: bool = False) -> Other:
        others.append(Other(name, value, declines))
        return others[-1]

    yield make
    for other in others:
        other.kill()


def nothing() -> None:
    pytest.fail("there is a copy already")


def mine() -> tuple[torch.Tensor, str]:
    return torch.zeros(4, 3), "placed here"


def asked(name: str, place: Callable[[], Any] = nothing, patience: float = SECONDS) -> OneCopy:
    copy = share(name, CPU, place, patience)
    assert copy is not None
    return copy


def test_who_comes_later_has_the_memory_of_who_was_first(name: str, start):
    first = start()
    where, is_own, rows = first.place()
    assert is_own and rows == torch.full((4, 3), 0.5).tolist()
    second = start()
    assert second.hear() == (where, False, rows)
    copy = asked(name)
    assert (copy.where, copy.is_own, copy.holder) == (where, False, first.process.pid)
    copy.check()
    for row, other in enumerate((first, second)):
        other.wire.send(row)
        assert other.hear() == "written"
        assert copy.rows[row].tolist() == [-1, -1, -1]
    assert copy.rows[2:].tolist() == rows[2:]
    assert asked(name) is copy


def test_who_comes_while_it_is_being_placed_waits_for_it(name: str, start):
    first = start()
    assert first.hear() == "placing"
    with pytest.raises(CannotShareError, match=rf"process {first.process.pid} is still placing it"):
        asked(name, patience=0.2)
    first.wire.send("go on")
    where, *_ = first.hear()
    assert asked(name).where == where


def test_the_end_of_a_holder_is_an_error_that_names_it_and_another_can_follow(name: str, start):
    first = start()
    first.place()
    copy = asked(name)
    copy.check()
    first.kill()
    for _ in range(2):
        with pytest.raises(LostCopyError, match=rf"process {first.process.pid}, which held"):
            copy.check()
    where, is_own, rows = start(value=7.0).place()
    assert is_own and where != copy.where and rows[0] == [7.0, 7.0, 7.0]


def test_the_end_of_a_user_is_nothing_to_the_others(name: str, start):
    first = start()
    first.place()
    second = start()
    second.hear()
    copy = asked(name)
    second.kill()
    copy.check()
    third = start()
    assert third.hear()[1] is False
    first.wire.send(0)
    assert first.hear() == "written" and copy.rows[0].tolist() == [-1, -1, -1]


@pytest.mark.parametrize("end", ["declines", "is killed"])
def test_where_the_first_finds_no_room_or_dies_the_next_asks_for_itself(end: str, name: str, start):
    first = start(declines=True)
    assert first.hear() == "placing"
    with pytest.raises(CannotShareError, match="still placing"):
        asked(name, patience=0.1)
    if end == "declines":
        first.wire.send("go on")
        assert first.hear() is None
    else:
        first.kill()
    copy = asked(name, place=mine)
    assert copy.is_own and copy.where == "placed here"
    assert start().hear() == ("placed here", False, torch.zeros(4, 3).tolist())


def test_copies_of_other_names_are_others(name: str, start):
    start().place()
    assert asked(name + " of another search", place=mine).is_own


def test_no_room_and_an_error_leave_the_name_free(name: str, monkeypatch: pytest.MonkeyPatch):
    assert share(name, CPU, lambda: None) is None

    def fail() -> None:
        raise ValueError("the disk is gone")

    with pytest.raises(ValueError, match="the disk is gone"):
        share(name, CPU, fail)

    def no_handle(_: torch.Tensor) -> None:
        raise RuntimeError("expandable segments have none")

    with monkeypatch.context() as allocator:
        allocator.setattr(one_copy, "reduce_tensor", no_handle)
        with pytest.raises(CannotShareError, match="exports no memory of cpu: expandable segments"):
            asked(name, place=mine)
    assert asked(name, place=mine).is_own


def test_a_copy_of_another_user_is_not_taken(name: str, start, monkeypatch: pytest.MonkeyPatch):
    first = start()
    first.place()
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(CannotShareError, match=rf"process {first.process.pid} of user"):
        asked(name)


def test_a_look_costs_less_than_a_thousandth_of_a_step(name: str, start):
    start().place()
    copy = asked(name)
    started = time.perf_counter()
    for _ in range(1000):
        copy.check()
    assert time.perf_counter() - started < 0.1  # 100 µs each, on a busy machine


def rebuilt(*arguments: Any) -> Any:
    """In place of CUDA: what it would have mapped."""
    return arguments


def test_a_gpu_has_the_index_of_who_maps_it(name: str, monkeypatch: pytest.MonkeyPatch):
    """Its holder may count other GPUs: torch's arguments, of which the seventh is the index."""
    real = (torch.Tensor, (4, 3), (3, 1), 0, torch.UntypedStorage, torch.float32, 0, b"handle")
    monkeypatch.setattr(one_copy, "rebuild_cuda_tensor", rebuilt)
    monkeypatch.setattr(one_copy, "reduce_tensor", lambda _: (rebuilt, real))
    address = f"\0{name}"
    listener = one_copy._claim(address)
    assert listener is not None and one_copy._claim(address) is None
    one_copy._hold(listener, CPU, mine)
    joined = one_copy._join(address, torch.device("cuda:5"), time.monotonic() + SECONDS)
    assert joined is not None
    assert list(joined.rows) == [*real[:6], 5, *real[7:]]


def test_the_index_is_where_torch_has_it():
    """Of the real function, by the name of its argument."""
    code = one_copy.rebuild_cuda_tensor.__code__
    assert code.co_varnames[one_copy._DEVICE_ARGUMENT] == "storage_device"
