"""Files of the cache: an open format, whole or not there, and nothing damaged is read."""

import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from raysae.store.files import CorruptFileError, checksum, map_tensors, verify, write_tensors

RNG = np.random.default_rng(0)
TENSORS = {
    "acts": RNG.standard_normal((50, 8)).astype(np.float32),
    "sum": RNG.standard_normal(8),
    "tokens": np.arange(50, dtype=np.int32),
    "ids": np.arange(7),
    "counts": RNG.random((3, 4)) < 0.5,
    "none": np.zeros((0, 4), np.float32),
}
CHECKSUMS = {name: checksum(array) for name, array in TENSORS.items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_tensors(tmp_path / "file.safetensors", TENSORS)
    return tmp_path / "file.safetensors"


def read(path: Path) -> dict[str, np.ndarray]:
    tensors = map_tensors(path)
    verify(path, tensors, CHECKSUMS)
    return tensors


def test_what_is_written_is_read_again_and_by_the_library_too(path: Path):
    theirs = load_file(path)
    for name, array in read(path).items():
        np.testing.assert_array_equal(array, TENSORS[name])
        np.testing.assert_array_equal(theirs[name].numpy(), TENSORS[name])
        assert array.dtype == TENSORS[name].dtype
    assert set(theirs) == set(TENSORS)


def test_bfloat16_is_what_it_is_to_others_and_int16_to_numpy(tmp_path: Path):
    values = torch.randn(6, 4).to(torch.bfloat16)
    bits = values.view(torch.int16).numpy()
    write_tensors(tmp_path / "f", {"acts": bits}, bfloat16=frozenset({"acts"}))
    assert torch.equal(load_file(tmp_path / "f")["acts"], values)
    np.testing.assert_array_equal(map_tensors(tmp_path / "f")["acts"], bits)


def test_mapped_arrays_cannot_be_written_to(path: Path):
    acts = read(path)["acts"]
    with pytest.raises(ValueError, match="read-only"):
        acts[0] = 1
    with pytest.raises(ValueError, match="cannot set WRITEABLE"):
        acts.setflags(write=True)


@pytest.mark.parametrize("share", [0, 0.002, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_named(path: Path, share: float):
    os.truncate(path, int(share * path.stat().st_size))
    with pytest.raises(CorruptFileError, match=str(path)):
        read(path)


def test_a_file_that_is_gone_is_named(path: Path):
    path.unlink()
    with pytest.raises(CorruptFileError, match=rf"{path}: No such file"):
        read(path)


def test_a_flipped_bit_anywhere_is_found(path: Path):
    whole = path.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    # In the header some bits name nothing that is read: those must leave the values as they were.
    for position in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            tensors = read(path)
        except CorruptFileError as error:
            assert str(path) in str(error)
            continue
        assert position < length
        for name, array in TENSORS.items():
            np.testing.assert_array_equal(tensors[name], array)


def test_another_tensor_under_the_name_is_found(path: Path):
    write_tensors(path, TENSORS | {"tokens": TENSORS["tokens"][::-1]})
    with pytest.raises(CorruptFileError, match="'tokens' is not what was written"):
        read(path)
    write_tensors(path, {"acts": TENSORS["acts"]})
    with pytest.raises(CorruptFileError, match="holds no tensor"):
        read(path)


def test_a_write_that_the_disk_refuses_leaves_what_was_there(path: Path):
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises((OSError, SafetensorError), match="too large"):
            write_tensors(path, TENSORS | {"acts": np.ones((50, 8), np.float32)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
