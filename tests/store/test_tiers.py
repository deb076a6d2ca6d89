"""Where the activations lie follows from sizes, and is said with them."""

import pytest

from raysae.store.tiers import choose_tier, fits_on_device, human

GIB = 1 << 30


@pytest.mark.parametrize(
    ("needed", "disk", "one_node", "mapped", "said"),
    [
        (GIB // 2, True, True, False, "in shared memory (512.0 MiB, the object store has room for"),
        (GIB, True, True, True, "mapped from disk (1.0 GiB, the object store has room for 716.8"),
        (GIB, False, True, False, "spilled to disk by Ray"),
        (GIB, True, False, False, "several nodes"),
        (3 * GIB, False, False, False, "no file on disk"),
    ],
)
def test_the_tier_is_chosen_by_size(
    needed: int, disk: bool, one_node: bool, mapped: bool, said: str
):
    on_disk, where = choose_tier(needed, GIB, disk=disk, one_node=one_node)
    assert on_disk is mapped
    assert said in where


def test_a_device_keeps_room_for_training():
    assert fits_on_device(GIB, 2 * GIB)
    assert not fits_on_device(GIB + 1, 2 * GIB)


@pytest.mark.parametrize(
    ("count", "words"),
    [(7, "7 bytes"), (1536, "1.5 KiB"), (5 << 20, "5.0 MiB"), (GIB * 3000, "3000.0 GiB")],
)
def test_sizes_in_words(count: int, words: str):
    assert human(count) == words
