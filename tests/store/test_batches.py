"""Batches: every row once an epoch, split between ranks, the same on every machine."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from raysae.store import batches
from raysae.store import rows as store_rows
from raysae.store.batches import ChunkedActivations
from raysae.store.chunks import Moments
from raysae.store.rows import batch_rows, mixed_batch_rows
from raysae.training.run import SAERun
from raysae.training.spec import TrainingSpec

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


def backwards(rows: np.ndarray, _: Path) -> list[np.ndarray]:
    """The last chunk first, gaps between them that are no number of whole rows."""
    memory = np.full(3 * len(rows) * rows.shape[1], np.nan, rows.dtype)
    places = [memory[401:404], memory[250:346], memory[2:83]]
    for place, chunk in zip(places, np.split(rows, [1, 33]), strict=True):
        place[:] = chunk.ravel()
    return [place.reshape(-1, rows.shape[1]) for place in places]


def far_apart(rows: np.ndarray, folder: Path) -> list[np.ndarray]:
    """At both ends of a file that is all hole between: an int32 does not count the numbers."""
    file = np.memmap(folder / "rows", rows.dtype, "w+", shape=2**31 + rows.size)
    places = [file[-rows[:1].size :], file[: rows[1:].size]]
    for place, chunk in zip(places, np.split(rows, [1]), strict=True):
        place[:] = chunk.ravel()
    return [place.reshape(-1, rows.shape[1]) for place in places]


def in_wider_rows(rows: np.ndarray, _: Path) -> list[np.ndarray]:
    return np.split(np.pad(rows, ((0, 0), (1, 2)))[:, 1:-2], [1, 33])


@pytest.mark.parametrize(
    "laid_out",
    [lambda rows, _: np.split(rows, [1, 33]), backwards, far_apart, in_wider_rows],
    ids=["one behind the other", "backwards", "far apart", "in wider rows"],
)
def test_rows_and_labels_come_from_the_right_chunk(laid_out, tmp_path):
    # The label says whether a row's number is divisible by 7.
    rows = np.arange(180, dtype=np.float32).reshape(60, 3)
    store = ChunkedActivations(
        laid_out(rows, tmp_path),
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
    run = SAERun(make_spec(), store)
    for _ in range(4):
        run.advance()
    assert digest(chunks) == before


def test_as_many_labels_as_rows_are_needed():
    with pytest.raises(ValueError, match=r"3 labels for 4 rows"):
        ChunkedActivations(
            [np.zeros((4, 2), np.float32)], np.zeros(3, bool), scale=1, mean=np.zeros(2), variance=1
        )


def with_moments(rows: np.ndarray, is_forget: np.ndarray, **kwargs) -> ChunkedActivations:
    """A store of three chunks that knows the moments of its corpora."""

    def moments(part: np.ndarray) -> Moments:
        exact = part.astype(np.float64)
        norms = np.linalg.norm(exact, axis=1)
        return Moments(len(part), exact.sum(0), norms.sum(), (norms**2).sum())

    by_name = {
        "all": moments(rows),
        "forget": moments(rows[is_forget]),
        "retain": moments(rows[~is_forget]),
    }
    chunks = np.split(rows, [len(rows) // 5, len(rows) // 2])
    return ChunkedActivations.with_moments(chunks, is_forget, by_name, **kwargs)


def test_the_batches_of_published_runs_are_unchanged():
    epoch, position = divmod(23, STEPS_IN_EPOCH)
    order = np.random.default_rng([5, epoch]).permutation(N_ROWS)
    wanted = order[position * BATCH : (position + 1) * BATCH]
    np.testing.assert_array_equal(batch_rows(N_ROWS, 5, 23, BATCH), wanted)


def test_saes_in_turns_have_each_epoch_permuted_once(monkeypatch):
    made: list[tuple[int, ...]] = []

    def permutation(n_rows: int, *seed: int) -> np.ndarray:
        made.append(seed)
        return np.random.default_rng(seed).permutation(n_rows)

    monkeypatch.setattr(store_rows, "_permutation", permutation)
    monkeypatch.setattr(store_rows, "_PERMUTATIONS", store_rows._Permutations())
    for step in range(2 * STEPS_IN_EPOCH):
        for seed in range(24):
            batch_rows(N_ROWS, seed, step, BATCH)
    assert sorted(made) == [(seed, epoch) for seed in range(24) for epoch in range(2)]


def test_permutations_of_saes_that_have_ended_are_dropped(monkeypatch):
    monkeypatch.setattr(store_rows, "_PERMUTATIONS", store_rows._Permutations())
    for seed in range(8):
        batch_rows(N_ROWS, seed, 0, BATCH)
    assert len(store_rows._PERMUTATIONS) == 8
    for step in range(300):
        batch_rows(N_ROWS, 8, step, BATCH)
    assert len(store_rows._PERMUTATIONS) == 1


def test_neighbours_in_a_batch_are_as_unrelated_as_in_a_full_shuffle():
    rows = np.concatenate([batch_rows(100_000, 0, step, 4096) for step in range(24)])
    shuffled = np.random.default_rng(1).permutation(100_000)[: len(rows)]
    for order in (rows, shuffled):  # 4 standard deviations of a sample correlation around 0
        correlation = np.corrcoef(order[:-1], order[1:])[0, 1]
        assert abs(correlation) < 4 / np.sqrt(len(rows))


@pytest.mark.parametrize("block", [1, 100, 1 << 20])
def test_blocks_do_not_change_a_batch(block: int, monkeypatch, make_store, sparse_rows):
    monkeypatch.setattr(batches, "CACHED_BYTES", 0)
    monkeypatch.setattr(batches, "BLOCK_BYTES", block)
    store, rows = make_store(), sparse_rows()
    batch, _ = store.batch(2, 1, 100)
    wanted = torch.from_numpy(rows[batch_rows(len(rows), 2, 1, 100)]) * store.scale
    assert torch.equal(batch, wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("how", [{"resident": True}, {"prefetch": True}])
def test_a_copy_on_the_device_and_a_look_ahead_change_no_batch(dtype: str, how, sparse_rows):
    rows = sparse_rows() if dtype == "float32" else as_bfloat16(sparse_rows())
    chunks, labels = np.array_split(rows, 4), np.arange(len(rows)) % 3 == 0
    units = {"scale": 0.37, "mean": np.zeros(16), "variance": 1.0}
    plain = ChunkedActivations(chunks, labels, **units)
    other = ChunkedActivations(chunks, labels, **units, **how)
    # In order, again, backwards, of another trial, of another rank, over the end of an epoch.
    for request in [(0, 0), (0, 1), (0, 1), (0, 0), (7, 3), (0, 2, 1, 2), (0, 3, 1, 2), (0, 11)]:
        seed, step, *rank = request
        for ours, theirs in zip(
            other.batch(seed, step, 100, *rank), plain.batch(seed, step, 100, *rank), strict=True
        ):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("share", [None, 0.25])
@pytest.mark.parametrize("how", [{}, {"resident": True}, {"prefetch": True}])
def test_batches_of_several_seeds_are_those_of_each(how, share, sparse_rows):
    rows = sparse_rows()
    store = with_moments(rows, np.arange(len(rows)) % 3 == 0, **how)
    store = store if share is None else store.with_forget_share(share)
    for step, rank in [(0, (0, 1)), (1, (0, 1)), (11, (0, 1)), (2, (1, 3))]:
        several = store.batches([5, 2, 5], step, 100, *rank)
        alone = [store.batch(seed, step, 100, *rank) for seed in (5, 2, 5)]
        for ours, theirs in zip(several, zip(*alone, strict=True), strict=True):
            assert torch.equal(ours, torch.stack(theirs))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("how", [{}, {"resident": True}, {"prefetch": True}])
def test_batches_on_a_gpu_are_those_of_the_cpu(dtype: str, how, sparse_rows):
    rows = sparse_rows() if dtype == "float32" else as_bfloat16(sparse_rows())
    chunks, labels = np.array_split(rows, 4), np.arange(len(rows)) % 3 == 0
    units = {"scale": 0.37, "mean": np.zeros(16), "variance": 1.0}
    plain = ChunkedActivations(chunks, labels, **units)
    other = ChunkedActivations(chunks, labels, **units, device="cuda", **how)
    # Read when all have been made: no batch may lie in memory that a later one was copied to.
    delivered = [other.batch(0, step, 100) for step in range(12)]
    for step, batch in enumerate(delivered):
        for ours, theirs in zip(batch, plain.batch(0, step, 100), strict=True):
            assert ours.is_cuda
            assert torch.equal(ours.cpu(), theirs)


FORGET, RETAIN = np.arange(0, 120, 4), np.setdiff1d(np.arange(120), np.arange(0, 120, 4))


def mixed(step: int, *args: int, share: float = 0.5, seed: int = 3) -> np.ndarray:
    return mixed_batch_rows(FORGET, RETAIN, share, seed, step, 20, *args)


@pytest.mark.parametrize(("share", "n_forget"), [(0.5, 10), (0.1, 2), (0.33, 7), (0.01, 0)])
def test_every_batch_has_the_set_share_of_forget_rows(share: float, n_forget: int):
    for step in range(8):
        rows = mixed(step, share=share)
        assert len(set(rows.tolist())) == 20
        assert np.isin(rows, FORGET).sum() == n_forget


def test_each_corpus_comes_as_a_whole_before_any_of_it_comes_again():
    rows = np.concatenate([mixed(step) for step in range(9)])  # 30 forget rows: 3 steps an epoch
    forget, retain = rows[np.isin(rows, FORGET)], rows[np.isin(rows, RETAIN)]
    for epoch in forget.reshape(3, 30):
        np.testing.assert_array_equal(np.sort(epoch), FORGET)
    np.testing.assert_array_equal(np.sort(retain), RETAIN)
    assert not np.array_equal(forget[:30], forget[30:60])


def test_a_mixed_batch_depends_on_seed_and_step_alone_and_ranks_part_it():
    first = [mixed(step) for step in range(6)]
    for step in reversed(range(6)):
        np.testing.assert_array_equal(mixed(step), first[step])
        for rank in range(3):
            np.testing.assert_array_equal(mixed(step, rank, 3), first[step][rank::3])
    assert not np.array_equal(mixed(0, seed=4), first[0])
    # Both corpora reach every rank: they are mixed, not one after the other or in turns.
    by_rank = np.array([[np.isin(part[r::2], FORGET).sum() for r in (0, 1)] for part in first])
    assert (by_rank > 0).all()


def test_a_share_that_a_corpus_cannot_fill_is_an_error_that_names_both():
    with pytest.raises(ValueError, match=r"asks for 36 forget rows a batch; the store has 30"):
        mixed_batch_rows(FORGET, RETAIN, 0.9, 0, 0, 40)


def test_a_store_with_a_share_has_the_units_of_its_mixture(sparse_rows):
    rows, is_forget = sparse_rows().astype(np.float64), np.arange(512) % 4 == 0
    rows[is_forget] += 3
    store = with_moments(rows.astype(np.float32), is_forget).with_forget_share(0.6)
    weight = np.where(is_forget, 0.6 / is_forget.sum(), 0.4 / (~is_forget).sum())
    scale = np.sqrt(16) / (weight @ np.linalg.norm(rows, axis=1))
    mean = weight @ rows
    assert store.scale == pytest.approx(scale, rel=1e-6)
    np.testing.assert_allclose(store.mean.numpy(), mean * scale, rtol=1e-5)
    variance = weight @ ((rows - mean) ** 2).sum(1) * scale**2
    assert store.variance == pytest.approx(variance, rel=1e-6)


def test_a_trial_trains_on_the_share_that_it_asks_for(make_spec, sparse_rows):
    store = with_moments(sparse_rows(), np.arange(512) % 4 == 0, prefetch=True)
    run = SAERun(make_spec(batch_size=50, forget_share=0.6), store)
    _, is_forget = run.source.batch(0, 0, 50)
    assert int(is_forget.sum()) == 30
    for _ in range(3):
        run.advance()
    # The store itself, which other trials use, stays as it is.
    np.testing.assert_array_equal(store.batch(0, 0, 50)[1], batch_rows(512, 0, 0, 50) % 4 == 0)
    b_dec = SAERun(make_spec(forget_share=0.6), store).sae.b_dec
    assert torch.equal(b_dec.detach(), run.source.mean)


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5])
def test_a_share_is_between_none_and_all(share: float):
    with pytest.raises(ValueError, match="forget_share"):
        TrainingSpec(forget_share=share)
