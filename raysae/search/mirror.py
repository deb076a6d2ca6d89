"""The copy of a run folder in a store, kept up by a thread of the search's process.

What the copy is good for: a search goes on from it as from a folder whose search was killed at some
moment. Journals are written before anyone acts on them, so nothing else of the copy may stand for
more than they do, but for what was written before them:

1. the checkpoints are opened as they are now, then both journals are read at one moment;
2. whatever else is new is sent: all that the journals tell of is there by now;
3. the journals are sent, and the manifest, which says how much of each belongs together;
4. the checkpoints opened at first are sent, and what is gone from the folder is removed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event
from typing import BinaryIO

from rich.console import Console

from raysae.errors import first_line
from raysae.journal import JOURNAL, JournalTail
from raysae.search.lock import LOCK_FILE
from raysae.search.services import background
from raysae.search.status import STATUS_FILE
from raysae.storage import MANIFEST, PART_BYTES, Location, address_of, write_manifest

OPTUNA_JOURNAL = "optuna.journal"
JOURNALS = (JOURNAL, OPTUNA_JOURNAL)
CHECKPOINT = "checkpoint.pt"
OWN = {*JOURNALS, MANIFEST}
HERE_ALONE = {LOCK_FILE, STATUS_FILE}
"""Files that mean something on this machine only."""
SCRATCH = {"pool", "tune", "saebench", "sparse_probing"}
"""Folders of Ray and of evaluators, of no use to another session."""
DRAFTS = (".partial", ".tmp", ".lock")

SYNC_SECONDS = 30.0
"""So often, or as seldom as a copy takes; after every trial that ends as well."""
POLL_SECONDS = 1.0
MOMENTS = 50
"""Times that the journals are read again because somebody wrote to them meanwhile."""
LAST_ATTEMPTS = 3
RETRY_SECONDS = 1.0


class Mirror:
    """Sends what changes in a run folder to its `Location`."""

    def __init__(self, run_dir: Path, location: Location) -> None:
        """What an earlier session has sent is not sent again. Raises OSError."""
        self._run_dir, self._location = run_dir, location
        self._sent: dict[str, tuple[int, int] | None] = {}
        """Size and time of change of each file of the copy, None where it is not this one."""
        here = {name: _stamp(run_dir / name) for name in self._files()}
        for name, (size, sent) in location.names().items():
            size_here, changed = here.get(name, (-1, 0))
            same = size_here == size and changed <= sent
            self._sent[name] = (size, changed) if same else None

    def sync(self) -> None:
        """Bring the copy up to date. Raises OSError where the store does not answer."""
        with ExitStack() as stack:
            checkpoints = {
                name: file
                for name in self._files()
                if name.endswith(CHECKPOINT) and (file := self._open(name, stack)) is not None
            }
            journals = read_together([self._run_dir / name for name in JOURNALS])
            kept = set(checkpoints)
            for name in self._files():
                if not name.endswith(CHECKPOINT):
                    kept.add(name)
                    with ExitStack() as own:
                        self._send(name, self._open(name, own))
            if journals is None:
                return  # the next time
            self._commit(journals)
            for name, file in checkpoints.items():
                self._send(name, file)
            for name in self._sent.keys() - kept - OWN:
                self._location.remove(name)
                del self._sent[name]

    def _files(self) -> list[str]:
        """What is copied beside the journals, by its path in the folder."""
        found = []
        for folder, folders, names in os.walk(self._run_dir):
            inner = os.path.relpath(folder, self._run_dir)
            if inner == ".":
                folders[:] = [name for name in folders if name not in SCRATCH]
                names = [name for name in names if name not in OWN | HERE_ALONE]
            found += [
                os.path.normpath(f"{inner}/{name}")
                for name in names
                if not name.endswith(DRAFTS) and not Path(folder, name).is_symlink()
            ]
        return sorted(found)

    def _open(self, name: str, stack: ExitStack) -> BinaryIO | None:
        """As it is now: a file that is replaced as a whole stays readable. None: it is gone."""
        try:
            return stack.enter_context((self._run_dir / name).open("rb"))
        except FileNotFoundError:
            return None

    def _send(self, name: str, file: BinaryIO | None) -> None:
        if file is None:
            return
        status = os.fstat(file.fileno())
        stamp = (status.st_size, status.st_mtime_ns)
        if self._sent.get(name) != stamp:
            self._location.put(name, _parts(file, status.st_size))
            self._sent[name] = stamp

    def _commit(self, journals: dict[str, bytes]) -> None:
        stamps = {name: (len(data), 0) for name, data in journals.items()}  # they only ever grow
        if self._sent.get(MANIFEST) and all(self._sent.get(n) == s for n, s in stamps.items()):
            return
        if MANIFEST not in self._sent:  # a first journal without the other counts for nothing
            self._send_manifest({})
        for name, data in journals.items():
            self._location.put(name, iter([data]))
        self._send_manifest(journals)
        self._sent |= stamps

    def _send_manifest(self, journals: dict[str, bytes]) -> None:
        sizes = {name: len(journals.get(name, b"")) for name in JOURNALS}
        manifest = write_manifest(self._run_dir, self._location, sizes)
        self._location.put(MANIFEST, iter([manifest]))
        self._sent[MANIFEST] = (len(manifest), 0)


def _stamp(path: Path) -> tuple[int, int]:
    """Size and time of change; of a file that is gone, those of none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return -1, 0
    return status.st_size, status.st_mtime_ns


def _parts(file: BinaryIO, size: int) -> Iterator[bytes]:
    """The first `size` bytes: what is appended meanwhile is for the next time."""
    while size > 0 and (part := file.read(min(size, PART_BYTES))):
        size -= len(part)
        yield part


def read_together(paths: list[Path]) -> dict[str, bytes] | None:
    """Contents by name of files that are appended to, as they were at one moment, in whole lines.

    None where somebody wrote to one of them during every attempt.
    """

    def sizes() -> list[int]:
        return [path.stat().st_size if path.is_file() else -1 for path in paths]

    for _ in range(MOMENTS):
        before = sizes()
        found = {path.name: path.read_bytes() for path in paths if path.is_file()}
        if sizes() == before:
            return {name: data[: data.rfind(b"\n") + 1] for name, data in found.items()}
        time.sleep(0.02)
    return None


class _Keeper:
    """The thread: when to copy, and what to say where that fails."""

    def __init__(self, run_dir: Path, location: Location, console: Console) -> None:
        self._run_dir, self._location, self._console = run_dir, location, console
        self._mirror: Mirror | None = None
        self._problem = ""
        """Why the last attempt failed."""
        self._warned = False
        self._stop = Event()
        self._tail = JournalTail(run_dir / JOURNAL)
        self._tail.new()  # of an earlier session
        if address_of(run_dir) != location.address:  # whoever resumes here will find it
            write_manifest(run_dir, location, {})
        self._thread = background(self.keep)

    def keep(self) -> None:
        due = time.monotonic() + SYNC_SECONDS
        while not self._stop.wait(POLL_SECONDS):
            ended = any(record["event"] == "end" for record in self._tail.new())
            if (ended or time.monotonic() >= due) and self._has_begun():
                started = time.monotonic()
                self._attempt()
                took = time.monotonic() - started
                due = time.monotonic() + max(SYNC_SECONDS, took)

    def _has_begun(self) -> bool:
        return (self._run_dir / "config.yaml").is_file()

    def _attempt(self) -> None:
        """A copy that fails is said once and tried again: it is no trial's fault."""
        try:
            if self._mirror is None:
                self._mirror = Mirror(self._run_dir, self._location)
            self._mirror.sync()
            self._problem = ""
        except Exception as error:
            self._problem = first_line(error) or type(error).__name__
        if self._problem and not self._warned:
            self._warned = True
            self._say(
                f"warning: not copied to {self._location.address}, tried again: {self._problem}"
            )

    def finish(self) -> None:
        """The last copy, and what became of it; once."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join()
        if not self._has_begun():
            return
        for attempt in range(LAST_ATTEMPTS):
            self._attempt()
            if not self._problem:
                self._say(f"Mirror: {self._location.address}")
                return
            time.sleep(attempt * RETRY_SECONDS)
        self._say(
            f"The mirror {self._location.address} is NOT complete: {self._problem}. Everything is "
            f"in {self._run_dir}; once more: python run_search.py --resume {self._run_dir}"
        )

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def mirroring(
    run_dir: Path, location: Location | None, console: Console
) -> Iterator[Callable[[], None]]:
    """Keep the copy up while a search runs; bring it up to date when it ends, however it ends.

    Yields what does the latter, for who must not wait for the end.
    """
    if location is None:
        yield lambda: None
        return
    keeper = _Keeper(run_dir, location, console)
    try:
        yield keeper.finish
    finally:
        keeper.finish()
