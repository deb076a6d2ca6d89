"""Where a run folder is mirrored to: an address of S3, Google Cloud Storage or a mounted folder.

The file systems are pyarrow's. Credentials come from where each service's own tools find them
(environment, profile, the machine's role) or stand in the address; what is written down or shown of
an address is `public`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

from raysae.errors import UserError, first_line
from raysae.run_files import read_object, require

MANIFEST = "mirror.json"
"""{"address", "journals": {name: bytes that belong together}}; in the copy, and in the run folder,
which knows by it where its copy is."""
PROBE = ".write-test"
PART_BYTES = 16 << 20


def is_address(text: str) -> bool:
    """Whether it is an address like s3://… and not a folder's path."""
    return "://" in text


def _checked(value: str) -> str:
    """The message does not repeat the value, which may hold a secret."""
    if not is_address(value):
        raise ValueError("must be an address: s3://bucket/prefix, gs://bucket/prefix, file:///path")
    return value


StorageAddress = Annotated[str, AfterValidator(_checked)]
"""A space file's `storage`."""


def public(address: str) -> str:
    """The address without user, password and query."""
    scheme, separator, rest = address.partition("://")
    rest = rest.partition("#")[0].partition("?")[0]
    secret, at, place = rest.rpartition("@")
    # An unescaped secret may hold slashes: then it is not in the first part of the path alone.
    if at and (":" in secret or "/" not in secret):
        rest = place
    return scheme + separator + rest.rstrip("/")


@dataclass(frozen=True)
class Location:
    """The copy of one run folder. Methods raise OSError where the store does not answer."""

    files: Any
    """pyarrow's file system."""
    root: str
    """Of the copy, as the file system names it."""
    address: str
    """Of the copy, public."""

    def names(self) -> dict[str, tuple[int, int]]:
        """Size and time of change (ns since the epoch) of every file, by its path in the folder."""
        from pyarrow.fs import FileSelector, FileType

        selector = FileSelector(self.root, recursive=True, allow_not_found=True)
        try:
            listed = self.files.get_file_info(selector)
        except FileNotFoundError:  # it was made while pyarrow looked whether it is there
            listed = []
        return {
            os.path.relpath(found.path, self.root): (found.size, found.mtime_ns)
            for found in listed
            if found.type == FileType.File and not found.path.endswith((PROBE, ".partial"))
        }

    def put(self, name: str, content: Iterator[bytes]) -> None:
        """Write a file; a reader sees the old one or the new one, whole."""
        path = f"{self.root}/{name}"
        # An object appears when its upload is completed. A file of a mounted folder grows in place.
        grows = self.files.type_name == "local"
        if grows:
            self.files.create_dir(path.rpartition("/")[0], recursive=True)
        with self.files.open_output_stream(path + ".partial" if grows else path) as stream:
            for part in content:
                stream.write(part)
        if grows:
            self.files.move(path + ".partial", path)

    def get(self, name: str, target: Path) -> None:
        """Copy a file to `target`, a path on this machine."""
        with (
            self.files.open_input_stream(f"{self.root}/{name}") as stream,
            target.open("wb") as out,
        ):
            shutil.copyfileobj(stream, out, PART_BYTES)

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""
        with suppress(FileNotFoundError):
            self.files.delete_file(f"{self.root}/{name}")


@contextmanager
def _said(option: str, address: str) -> Iterator[None]:
    """Errors of a store as one message, which holds no secret of the address."""
    try:
        yield
    except (OSError, ValueError) as error:  # pyarrow's own are among them
        words = first_line(error).replace(address, public(address))
        raise UserError(f"{option} {public(address)}: {words}") from None


def locate(option: str, address: str, name: str = "") -> Location:
    """The place of a run folder in a store.

    Args:
        option: where the address comes from, for messages.
        address: of the place, or of the folder that holds `name`.
        name: of the run folder.

    Raises:
        UserError: no such kind of store, or an address that it does not understand.
    """
    from pyarrow.fs import FileSystem

    with _said(option, address):
        files, root = FileSystem.from_uri(address)
    parts = [part for part in (root.rstrip("/"), name) if part]
    shown = "/".join(part for part in (public(address), name) if part)
    if not root.strip("/"):
        raise UserError(f"{option} {shown}: needs a bucket or a folder, as in s3://bucket/prefix")
    return Location(files, "/".join(parts), shown)


def reserve(option: str, address: str, name: str = "", *, new: bool = False) -> Location:
    """As `locate`, of a place that can be written; `new`: and where nothing is yet.

    Raises:
        UserError: as `locate`, or one of both is not so.
    """
    location = locate(option, address, name)
    with _said(option, address):
        there = location.names()
        location.put(PROBE, iter([b"raysae"]))
        location.remove(PROBE)
    if new and there:
        raise UserError(
            f"{option} {location.address}: a search is there already; go on with it by --resume "
            f"{location.address}, or choose another --out or --storage"
        )
    return location


def find_copy(address: str) -> Location:
    """The copy of a run folder at an address, which can be read and written.

    Raises:
        UserError: there is none.
    """
    option, location = "--resume", locate("--resume", address)
    with _said(option, address):
        there = location.names()
    if "config.yaml" not in there:
        runs = sorted({name.split("/")[0] for name in there if name.count("/config.yaml")})
        hint = f"; it has the run folders {', '.join(runs)}" if runs else ""
        raise UserError(f"{option} {location.address}: no run folder (one has a config.yaml){hint}")
    return reserve(option, address)


def address_of(run_dir: Path) -> str | None:
    """Where an earlier session of the search kept a copy of its run folder; None: nowhere."""
    path = run_dir / MANIFEST
    if not path.is_file():
        return None
    advice = "remove it, and name the mirror with --storage if there is one"
    manifest = read_object(path, advice)
    require(manifest, ("address",), path, advice)
    return str(manifest["address"])


def write_manifest(run_dir: Path, location: Location, journals: dict[str, int]) -> bytes:
    """Into the run folder; what is to be sent."""
    data = json.dumps({"address": location.address, "journals": journals}).encode()
    (run_dir / MANIFEST).write_bytes(data)
    return data


def fetch(location: Location, run_dir: Path) -> None:
    """Bring a copy into an empty run folder, as it was at one moment of its search.

    Raises:
        UserError: it cannot be read or written.
    """
    draft = run_dir.with_name(f".{run_dir.name}.fetched")
    shutil.rmtree(draft, ignore_errors=True)  # of an attempt that was cut off
    with _said("--resume", location.address):
        for name, (_, changed) in location.names().items():
            path = draft / name
            if ".." in Path(name).parts:  # an object may have any name
                raise ValueError(f"{name} is no file of a run folder")
            path.parent.mkdir(parents=True, exist_ok=True)
            location.get(name, path)
            os.utime(path, ns=(changed, changed))  # unchanged: it is not sent again
    _cut_journals(draft)
    draft.replace(run_dir)


def _cut_journals(folder: Path) -> None:
    """To what belongs together: a copy may have been cut off between one journal and the next."""
    manifest = folder / MANIFEST
    if manifest.is_file():
        for name, size in json.loads(manifest.read_text(encoding="utf-8"))["journals"].items():
            path = folder / name
            if path.is_file():
                os.truncate(path, min(size, path.stat().st_size))
