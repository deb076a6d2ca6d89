"""One copy of the activations on a device, for all processes that read it there.

The first process to ask places the copy and holds it, the others map the same memory: CUDA IPC, as
torch.multiprocessing has it. They find each other by a name in Linux' abstract socket namespace,
which the kernel gives to one process at a time and takes back when that process ends, however it
ends. Nothing is left behind on a disk, and nobody has to be told who was first.

Over its connection a user is sent a handle of its own, because torch counts the users of memory by
its handles. The connection then stays open and silent: its end is the end of the holder. CUDA does
not say what memory holds whose exporter has ended, so users look for that end before every batch,
and raise. (Linux' driver keeps the memory until its last user lets go of it: what was read between
the holder's end and the next look was still right.)

Ray's transport of tensors (`ray.put(…, _tensor_transport="cuda_ipc")`, alpha in 2.60) maps memory
in the same way. It is not used: nobody tells its readers that the source has died, all of them are
sent one handle and so share one count of users, and its event is destroyed before they open it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 600.0
"""For a holder that is alive and still placing the copy; one that has died is noticed at once."""
RETRY_SECONDS = 0.02

_DEVICE_ARGUMENT = 6
"""Of `rebuild_cuda_tensor`: the GPU's index in the process that has exported."""
_LENGTH = struct.Struct("!Q")
_CREDENTIALS = struct.Struct("3i")  # pid, user, group: SO_PEERCRED


class LostCopyError(Exception):
    """The process that holds the copy has ended: this process must be started again."""


class CannotShareError(Exception):
    """There can be no copy for several processes here; the message says why."""


@dataclass(frozen=True)
class OneCopy:
    """A copy in memory that this process and others read, and by convention nobody writes to."""

    rows: Tensor
    """(rows, d_in) on the device."""
    where: str
    """It lies, in words of who placed it."""
    holder: int
    """Process id of who placed it."""
    _connection: socket.socket | None = field(default=None, repr=False)

    @property
    def is_own(self) -> bool:
        """Whether this process holds it for the others."""
        return self._connection is None

    def check(self) -> None:
        """See that the memory may be read.

        Raises:
            LostCopyError: its holder has ended.
        """
        if self._connection is None:
            return
        try:
            # Nothing is ever sent after the handle: what can be read is the connection's end.
            self._connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError:
            pass
        raise LostCopyError(
            f"process {self.holder}, which held the activations on {self.rows.device} for this "
            "one, has ended"
        )


_COPIES: dict[str, OneCopy] = {}
"""Of this process, until it ends: whom a holder serves cannot do without it earlier."""


def device_identity(device: torch.device) -> str:
    """The same for all processes of a machine that mean the same device.

    Its index is not: every process counts the GPUs in its own CUDA_VISIBLE_DEVICES.
    """
    if device.type != "cuda":
        return str(device)
    return str(torch.cuda.get_device_properties(device).uuid)


def share(
    name: str,
    device: torch.device,
    place: Callable[[], tuple[Tensor, str] | None],
    patience: float = PATIENCE_SECONDS,
) -> OneCopy | None:
    """The copy of that name on the device: placed by this process, or mapped from another's.

    Args:
        name: the same for all processes that are to share, and nobody else's.
        device: one that `name` is about, as this process counts.
        place: makes the copy, and words where it lies; None where there is no room for one.
        patience: seconds to wait for a process that is placing it.

    Returns:
        the copy, or None if `place` has said so.

    Raises:
        CannotShareError: the copy cannot be handed on, or not be mapped here, or did not come.
    """
    name = f"{name}:{device_identity(device)}"
    if name in _COPIES:
        return _COPIES[name]
    address = "\0raysae-" + hashlib.sha256(name.encode()).hexdigest()
    deadline = time.monotonic() + patience
    while True:
        listener = _claim(address)
        if listener is not None:
            copy = _hold(listener, device, place)
        else:
            copy = _join(address, device, deadline)
            if copy is None:  # who was first has found no room, or has died: who is next?
                if time.monotonic() > deadline:
                    raise CannotShareError(f"nobody has placed it within {patience:.0f} s")
                time.sleep(RETRY_SECONDS)
                continue
        if copy is not None:
            _COPIES[name] = copy
        return copy


def _claim(address: str) -> socket.socket | None:
    """A socket that listens there; None where another process does."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        if isinstance(error, PermissionError | FileNotFoundError):  # no abstract names: not Linux
            raise CannotShareError(f"no socket of that name: {error}") from error
        return None
    listener.listen()
    return listener


# ---- who holds it


def _hold(
    listener: socket.socket, device: torch.device, place: Callable[[], tuple[Tensor, str] | None]
) -> OneCopy | None:
    try:
        placed = place()
        if placed is None:
            listener.close()  # who waits here is turned away, and asks for itself
            return None
        copy = OneCopy(*placed, holder=os.getpid())
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the others' streams do not wait for this one's
        _message(copy)
    except BaseException as error:
        listener.close()
        if isinstance(error, _CannotExportError):
            raise CannotShareError(str(error)) from error
        raise
    threading.Thread(target=_serve, args=(listener, copy), name="one copy", daemon=True).start()
    return copy


class _CannotExportError(Exception):
    """Torch makes no handle of the memory."""


def _message(copy: OneCopy) -> bytes:
    """A handle for one user more.

    Raises:
        _CannotExportError: the allocator's memory has none, as that of expandable segments may not.
    """
    try:
        if copy.rows.is_cuda:
            with torch.cuda.device(copy.rows.device):
                handle = reduce_tensor(copy.rows)
        else:
            handle = reduce_tensor(copy.rows)
        return bytes(ForkingPickler.dumps((handle, copy.where)))
    except RuntimeError as error:
        raise _CannotExportError(
            f"torch exports no memory of {copy.rows.device}: {error}"
        ) from error


def _serve(listener: socket.socket, copy: OneCopy) -> None:
    """Hand the copy to whoever comes, until this process ends."""
    users = []  # their connections, which must stay open
    while True:
        connection, _ = listener.accept()
        if _peer(connection)[1] != os.getuid():
            connection.close()
            continue
        try:
            message = _message(copy)
            connection.sendall(_LENGTH.pack(len(message)) + message)
        except (OSError, _CannotExportError):
            log.warning("a process was not handed the copy on %s", copy.rows.device, exc_info=True)
            connection.close()
            continue
        users.append(connection)


# ---- who uses it


def _join(address: str, device: torch.device, deadline: float) -> OneCopy | None:
    """Another process's copy; None if it has gone, or has declined to place one."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(address)
        holder, user = _peer(connection)
        if user != os.getuid():
            raise CannotShareError(f"process {holder} of user {user} has taken its name")
        length = _LENGTH.unpack(_receive(connection, _LENGTH.size, deadline))[0]
        message = _receive(connection, length, deadline)
    except (ConnectionError, EOFError):
        connection.close()
        return None
    except TimeoutError as error:
        connection.close()
        raise CannotShareError(f"process {holder} is still placing it") from error
    except BaseException:
        connection.close()
        raise
    (rebuild, arguments), where = pickle.loads(message)  # from a process of the same user
    if rebuild is rebuild_cuda_tensor:
        arguments = list(arguments)
        arguments[_DEVICE_ARGUMENT] = _index(device)
    try:
        rows = rebuild(*arguments)
    except RuntimeError as error:
        connection.close()
        raise CannotShareError(f"memory of process {holder} cannot be mapped: {error}") from error
    connection.setblocking(False)
    return OneCopy(rows, where, holder, connection)


def _receive(connection: socket.socket, length: int, deadline: float) -> bytes:
    received = bytearray()
    while len(received) < length:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        part = connection.recv(length - len(received))
        if not part:
            raise EOFError
        received += part
    return bytes(received)


def _peer(connection: socket.socket) -> tuple[int, int]:
    """Process id and user id of who is at the other end, from the kernel."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    process, user, _ = _CREDENTIALS.unpack(raw)
    return process, user


def _index(device: torch.device) -> Any:
    return torch.cuda.current_device() if device.index is None else device.index
