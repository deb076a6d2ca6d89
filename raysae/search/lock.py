"""One search at a time in a run folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from raysae.errors import UserError

LOCK_FILE = "lock"
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What file systems without locks answer: Lustre mounted without them, NFS without its lock
service, some object-store mounts."""


@contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Hold the run folder; the system lets go of it when the process dies, however it dies.

    Raises:
        UserError: another process holds it, or the file system has no locks.
    """
    path = run_dir / LOCK_FILE
    try:
        file = path.open("a+", encoding="utf-8")
    except PermissionError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{run_dir}: another search is at work there ({_owner(file.read())}); wait for it, "
                "or choose another --out"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            raise UserError(
                f"{run_dir}: its file system has no locks ({error.strerror}), and without one two "
                "searches could write there at once; have it mounted with them (Lustre: -o flock; "
                "NFS: with its lock service), or set --out to a folder of another file system"
            ) from None
        file.truncate(0)
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": now}
        file.write(json.dumps(owner))
        file.flush()
        yield


def _owner(text: str) -> str:
    try:
        owner = json.loads(text)
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (ValueError, KeyError):
        return "it has not said which"
