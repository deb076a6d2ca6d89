"""Batches: every row once an epoch, split between ranks, the same on every machine."""

import gc
import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from weakref import ReferenceType, ref

import numpy as np
import pytest
import torch

from raysae.store import batches
from raysae.store import rows as store_rows
from raysae.store.batches import ChunkedActivations
from raysae.store.chunks import Moments
from raysae.store.rows import batch_rows, mixed_batch_rows
from raysae.training.loop import Events, train
from raysae.training.run import SAERun
from raysae.training.spec import TrainingSpec

N_ROWS, BATCH = 103, 10


def stream(seed: int, epochs: int, n_rows: int = N_ROWS, batch: int = BATCH) -> np.ndarray:
    """The rows of so many epochs, as their batches bring them one after the other."""
    steps = -(-epochs * n_rows // batch)
    rows = np.concatenate([batch_rows(n_rows, seed, step, batch) for step in range(steps)])
    return rows[: epochs * n_rows]


def digest(chunks: list[np.ndarray]) -> str:
    return hashlib.sha256(b"".join(chunk.tobytes() for chunk in chunks)).hexdigest()


def as_bfloat16(rows: np.ndarray) -> np.ndarray:
    """The int16 view of the rows rounded to bfloat16, as a store keeps them."""
    return torch.from_numpy(rows).to(torch.bfloat16).view(torch.int16).numpy()


@pytest.mark.parametrize(
    ("n_rows", "batch"), [(103, 10), (40, 8), (100, 64), (65, 64), (64, 64), (64, 1), (129, 64)]
)
def test_every_epoch_holds_every_row_once_whatever_the_batch(n_rows: int, batch: int):
    for epoch in stream(0, 9, n_rows, batch).reshape(9, n_rows):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(n_rows))


@pytest.mark.parametrize("size", [2, 3])
def test_the_workers_of_a_trial_are_brought_every_row_once_an_epoch(size: int):
    steps = range(N_ROWS)  # BATCH epochs, to the row
    of_ranks = [
        np.concatenate([batch_rows(N_ROWS, 0, step, BATCH, rank, size) for step in steps])
        for rank in range(size)
    ]
    times = np.bincount(np.concatenate(of_ranks), minlength=N_ROWS)
    np.testing.assert_array_equal(times, np.full(N_ROWS, BATCH))


@pytest.mark.parametrize(("n_rows", "batch"), [(103, 10), (20, 10), (21, 10), (1000, 499)])
def test_a_batch_over_the_end_of_an_epoch_holds_no_row_twice(n_rows: int, batch: int):
    over_the_end = 0
    for step in range(12 * n_rows // batch):
        over_the_end += step * batch // n_rows < ((step + 1) * batch - 1) // n_rows
        assert len(set(batch_rows(n_rows, 4, step, batch).tolist())) == batch
    assert over_the_end or n_rows % batch == 0


def test_a_batch_needs_none_before_it(monkeypatch):
    rows = stream(5, 6)
    for step in (44, 10, 30, 31, 0, 20):  # 10, 20, 30 lie over the ends of epochs
        monkeypatch.setattr(store_rows, "_ORDERS", store_rows._Orders())
        wanted = rows[step * BATCH : (step + 1) * BATCH]
        np.testing.assert_array_equal(batch_rows(N_ROWS, 5, step, BATCH), wanted)


def test_epochs_are_shuffled_differently():
    first, second = stream(0, 2).reshape(2, N_ROWS)
    assert (first == second).mean() < 0.1


def test_seeds_shuffle_differently():
    assert not np.array_equal(stream(0, 1), stream(1, 1))


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


def test_an_epoch_is_numpys_permutation_of_seed_and_epoch_but_for_what_its_first_batch_has():
    first, second = (np.random.default_rng([5, epoch]).permutation(N_ROWS) for epoch in (0, 1))
    rows = stream(5, 2)
    np.testing.assert_array_equal(rows[:N_ROWS], first)
    # The batch over the end has 3 rows of the first epoch, and 7 of the second.
    twice = np.isin(second[:7], first[-3:]).sum()
    moved = np.flatnonzero(rows[N_ROWS:] != second)
    assert len(moved) == 2 * twice
    assert not np.isin(rows[N_ROWS : N_ROWS + 7], first[-3:]).any()


def test_saes_in_turns_have_each_epoch_permuted_once(monkeypatch):
    made: list[tuple[int, ...]] = []

    def permutation(n_rows: int, *seed: int) -> np.ndarray:
        made.append(seed)
        return np.random.default_rng(seed).permutation(n_rows)

    monkeypatch.setattr(store_rows, "_permutation", permutation)
    monkeypatch.setattr(store_rows, "_ORDERS", store_rows._Orders())
    for step in range(2 * N_ROWS // BATCH):
        for seed in (*range(24), 0):  # the first one's batch is wanted by two
            batch_rows(N_ROWS, seed, step, BATCH)
    assert sorted(made) == [(seed, epoch) for seed in range(24) for epoch in range(2)]


def test_permutations_of_saes_that_have_ended_are_dropped(monkeypatch):
    monkeypatch.setattr(store_rows, "_ORDERS", store_rows._Orders())
    for seed in range(8):
        batch_rows(N_ROWS, seed, 0, BATCH)
    assert len(store_rows._ORDERS) == 8
    for step in range(300):
        batch_rows(N_ROWS, 8, step, BATCH)
    assert len(store_rows._ORDERS) == 1


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


def held_bytes(monkeypatch) -> Callable[[], int]:
    """Counts the bytes of the batches that lie ready, and have not been let go of."""
    ready: list[ReferenceType[torch.Tensor]] = []
    make = ChunkedActivations._make_ahead

    def made(self: ChunkedActivations, *request: int):
        ahead = make(self, *request)
        ready.append(ref(ahead.batch[0]))
        return ahead

    monkeypatch.setattr(ChunkedActivations, "_make_ahead", made)

    def count() -> int:
        gc.collect()
        return sum(batch.nbytes for batch in (held() for held in ready) if batch is not None)

    return count


@pytest.mark.parametrize("share", [None, 0.3])
@pytest.mark.parametrize("stopped", [False, True])
def test_runs_that_have_ended_leave_no_batches(
    share: float | None, stopped: bool, make_spec, sparse_rows, fake_result, monkeypatch
):
    held = held_bytes(monkeypatch)
    store = with_moments(sparse_rows(), np.arange(512) % 3 == 0, prefetch=True)
    spec = make_spec(batch_size=50, forget_share=share).model_copy(update={"seeds": 3})
    runs = [SAERun(member, store) for member in spec.members()]
    seen = []

    def on_events(events: Events) -> list[bool]:
        store._thread.submit(lambda: None).result()  # what is being made is ready
        seen.append(held())
        return [not (stopped and run == 1 and len(seen) == 1) for run in range(len(events))]

    train(runs, lambda saes, _: [fake_result() for _ in saes], on_events)
    del runs
    assert seen[0] == 3 * 50 * 16 * 4
    assert seen[1] == (2 if stopped else 3) * 50 * 16 * 4
    store._thread.submit(lambda: None).result()
    assert held() == 0


def test_a_share_that_nobody_trains_on_takes_no_memory(sparse_rows):
    store = with_moments(sparse_rows(), np.arange(512) % 3 == 0, prefetch=True)
    sources = [store.with_forget_share(0.2 + 0.01 * i) for i in range(40)]
    assert store.with_forget_share(0.2) is sources[0]
    rows = {id(part) for source in sources for part in source._mixed[:2]}
    assert len(rows) == 2  # the corpora's row numbers, once for all
    for source in sources:
        source.batch(0, 0, 64)
    store._thread.submit(lambda: None).result()
    ended = [ref(source) for source in sources]
    del sources, source
    gc.collect()
    assert [source for source in ended if source() is not None] == []


def test_a_store_goes_to_another_process_whoever_trains_on_it_here(sparse_rows):
    store = with_moments(sparse_rows(), np.arange(512) % 3 == 0)
    mixture = store.with_forget_share(0.3)
    there = pickle.loads(pickle.dumps(store))
    assert torch.equal(there.batch(0, 1, 64)[0], store.batch(0, 1, 64)[0])
    for ours, theirs in zip(
        there.with_forget_share(0.3).batch(0, 1, 64), mixture.batch(0, 1, 64), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_copys_orders_are_let_go_of_with_their_seed(sparse_rows):
    store = with_moments(sparse_rows(), np.arange(512) % 3 == 0, resident=True)
    for seed in range(3):
        store.batch(seed, 0, 64)
    store.done_with([0, 2])
    assert list(store._orders._made) == [(1, 64)]


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


@pytest.mark.parametrize(("share", "n_forget"), [(0.5, 10), (0.1, 2), (0.33, 7), (0.75, 15)])
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


def test_a_corpus_that_is_no_number_of_its_parts_comes_as_a_whole_too():
    forget, retain = np.arange(100), np.arange(100, 1000)
    batches = [mixed_batch_rows(forget, retain, 0.5, 0, step, 128) for step in range(225)]
    stream = np.concatenate(batches)
    for corpus in (forget, retain):
        # Within a batch the corpora are mixed: 64 rows of each, of any epoch of 25 · 64 and more.
        times = np.bincount(stream[np.isin(stream, corpus)])[corpus]
        np.testing.assert_array_equal(times, np.full(len(corpus), 225 * 64 // len(corpus)))
    for batch in batches[:2]:  # one part and a half is an epoch
        forget = np.setdiff1d(forget, batch)
    assert len(forget) == 0


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


@pytest.mark.parametrize(
    ("share", "batch_size", "said"),
    [
        (0.003, 128, r"no forget rows; it takes a forget_share from 0.0078125 to 0.992188, or a "
         r"batch_size of at least 167"),
        (0.02, 25, r"no forget rows; .* from 0.04 to 0.96, or a batch_size of at least 26"),
        (0.95, 5, r"forget rows alone; .* from 0.2 to 0.8, or a batch_size of at least 11"),
        (0.5, 1, r"no forget rows; it takes a batch_size of at least 2"),
    ],
)  # fmt: skip
def test_a_share_that_leaves_a_corpus_out_is_refused_and_what_would_do_is_named(
    share: float, batch_size: int, said: str
):
    for make in (
        lambda: mixed_batch_rows(FORGET, RETAIN, share, 0, 0, batch_size),
        lambda: TrainingSpec(forget_share=share, batch_size=batch_size),
    ):
        with pytest.raises(ValueError, match=said):
            make()
    wanted = int(said.rsplit(" ", 1)[1])
    assert 0 < round(share * wanted) < wanted
    assert round(share * (wanted - 1)) in (0, wanted - 1)


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5])
def test_a_share_is_between_none_and_all(share: float):
    with pytest.raises(ValueError, match="forget_share"):
        TrainingSpec(forget_share=share)
