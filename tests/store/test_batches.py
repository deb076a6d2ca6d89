"""Batches: every row once an epoch, split between ranks, the same on every machine."""

import hashlib

import numpy as np
import pytest
import torch

from raysae.store.batches import ChunkedActivations
from raysae.store.rows import batch_rows
from raysae.training.loop import TrialRun

N_ROWS, BATCH = 103, 10
STEPS_IN_EPOCH = N_ROWS // BATCH


def epoch_rows(seed: int, epoch: int) -> np.ndarray:
    steps = range(epoch * STEPS_IN_EPOCH, (epoch + 1) * STEPS_IN_EPOCH)
    return np.concatenate([batch_rows(N_ROWS, seed, step, BATCH) for step in steps])


def digest(chunks: list[np.ndarray]) -> str:
    return hashlib.sha256(b"".join(chunk.tobytes() for chunk in chunks)).hexdigest()


def as_bfloat16(rows: np.ndarray) -> np.ndarray:
    """The int16 view of the rows rounded to bfloat16, as a store keeps them."""
    return torch.from_numpy(rows).to(torch.bfloat16).view(torch.int16).numpy()


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_an_epoch_holds_no_row_twice_and_leaves_out_less_than_a_batch(epoch: int):
    rows = epoch_rows(seed=0, epoch=epoch)
    assert len(set(rows.tolist())) == len(rows) == STEPS_IN_EPOCH * BATCH
    assert rows.min() >= 0
    assert rows.max() < N_ROWS


def test_an_epoch_holds_every_row_when_batches_divide_the_store():
    rows = np.concatenate([batch_rows(40, 7, step, 8) for step in range(5)])
    np.testing.assert_array_equal(np.sort(rows), np.arange(40))


def test_epochs_are_shuffled_differently():
    assert not np.array_equal(epoch_rows(0, 0), epoch_rows(0, 1))


def test_seeds_shuffle_differently():
    assert not np.array_equal(epoch_rows(0, 0), epoch_rows(1, 0))


def test_a_batch_depends_on_seed_and_step_alone():
    first = [batch_rows(N_ROWS, 5, step, BATCH) for step in range(30)]
    for step in reversed(range(30)):  # in another order, with other trials in between
        batch_rows(N_ROWS, 6, step, BATCH)
        np.testing.assert_array_equal(batch_rows(N_ROWS, 5, step, BATCH), first[step])


@pytest.mark.parametrize("size", [1, 2, 3, 4, BATCH])
def test_ranks_partition_the_batch(size: int):
    whole = batch_rows(N_ROWS, 0, 13, BATCH)
    parts = [batch_rows(N_ROWS, 0, 13, BATCH, rank, size) for rank in range(size)]
    assert sorted(np.concatenate(parts)) == sorted(whole)
    for rank, part in enumerate(parts):
        np.testing.assert_array_equal(part, whole[rank::size])


def test_a_batch_larger_than_the_store_is_an_error_that_names_both():
    with pytest.raises(ValueError, match=r"104.*103"):
        batch_rows(N_ROWS, 0, 0, 104)


def test_a_batch_as_large_as_the_store_is_the_store():
    np.testing.assert_array_equal(np.sort(batch_rows(8, 0, 3, 8)), np.arange(8))


def test_rows_and_labels_come_from_the_right_chunk():
    # Row i holds i in every column, and the label says whether i is divisible by 7.
    rows = np.repeat(np.arange(60, dtype=np.float32)[:, None], 3, axis=1)
    store = ChunkedActivations(
        [rows[:1], rows[1:33], rows[33:]],
        np.arange(60) % 7 == 0,
        scale=0.5,
        mean=rows.mean(0),
        variance=2.0,
    )
    for step in range(9):
        wanted = batch_rows(60, 4, step, 20)
        batch, is_forget = store.batch(4, step, 20)
        np.testing.assert_array_equal(batch.numpy(), 0.5 * rows[wanted])
        np.testing.assert_array_equal(is_forget.numpy(), wanted % 7 == 0)
        assert (batch.dtype, is_forget.dtype) == (torch.float32, torch.bool)


def test_mean_and_variance_are_scaled_like_the_rows(make_store, sparse_rows):
    store = make_store()
    scaled = sparse_rows().astype(np.float64) * store.scale
    np.testing.assert_allclose(store.mean.numpy(), scaled.mean(0), rtol=1e-5)
    variance = ((scaled - scaled.mean(0)) ** 2).sum(1).mean()
    assert store.variance == pytest.approx(variance, rel=1e-6)


def test_bfloat16_chunks_give_the_rounded_rows(sparse_rows):
    rows = sparse_rows()
    labels = np.zeros(len(rows), dtype=bool)
    store = ChunkedActivations(
        [as_bfloat16(rows)], labels, scale=1.0, mean=rows.mean(0), variance=1.0
    )
    batch, _ = store.batch(0, 0, 64)
    wanted = torch.from_numpy(rows[batch_rows(len(rows), 0, 0, 64)])
    assert torch.equal(batch, wanted.to(torch.bfloat16).float())
    torch.testing.assert_close(batch, wanted, rtol=2**-8, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_never_writes_to_the_chunks(dtype: str, sparse_rows, make_spec):
    rows = sparse_rows()
    stored = rows if dtype == "float32" else as_bfloat16(rows)
    chunks = [chunk.copy() for chunk in np.array_split(stored, 3)]
    for chunk in chunks:
        chunk.setflags(write=False)
    before = digest(chunks)
    store = ChunkedActivations(
        chunks, np.arange(len(rows)) % 2 == 0, scale=0.7, mean=rows.mean(0), variance=30.0
    )
    batch, _ = store.batch(0, 0, 64)
    batch.zero_()  # a batch is the caller's own
    run = TrialRun(make_spec(), store)
    for _ in range(4):
        run.advance()
    assert digest(chunks) == before


def test_as_many_labels_as_rows_are_needed():
    with pytest.raises(ValueError, match=r"3 labels for 4 rows"):
        ChunkedActivations(
            [np.zeros((4, 2), np.float32)], np.zeros(3, bool), scale=1, mean=np.zeros(2), variance=1
        )
