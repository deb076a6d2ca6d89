"""Where activations and evaluation cache lie: on the device, in shared memory, in mapped files."""

from __future__ import annotations

MEMORY_SHARE = 0.7
"""Of the object store: results and messages need room beside activations and evaluation cache."""
DEVICE_SHARE = 0.5
"""Of a device's free memory: SAE, optimiser, gradients and the language model come later."""


def choose_tier(
    needed: int, store_memory: int, *, disk: bool, one_node: bool, taken: int = 0
) -> tuple[bool, str]:
    """Whether something shared is mapped from disk, and where it lies and why, in words.

    Args:
        needed: its bytes.
        store_memory: bytes of the object store of the smallest node.
        disk: whether there is a cache whose files can be mapped.
        one_node: files of this machine cannot be mapped on others.
        taken: bytes of the object store that are promised already.
    """
    room = room_in_store(store_memory, taken)
    measured = f"{human(needed)}, the object store has room for {human(room)}"
    if needed <= room:
        return False, f"in shared memory ({measured})"
    if disk and one_node:
        return True, f"mapped from disk ({measured})"
    why = "there is no file on disk to map" if not disk else "several nodes cannot map one's files"
    return False, f"in shared memory, the rest spilled to disk by Ray ({measured}, and {why})"


def room_in_store(store_memory: int, taken: int = 0) -> int:
    """Bytes that an object store has room for, beside those that are taken."""
    return max(0, int(MEMORY_SHARE * store_memory) - taken)


def fits_on_device(needed: int, free: int) -> bool:
    """Whether a device with so many free bytes keeps a copy of the whole store."""
    return needed <= DEVICE_SHARE * free


def human(count: float) -> str:
    """Bytes in words: "45.5 MiB"."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
