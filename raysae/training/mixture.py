"""How many rows of a batch are of the forget corpus."""

from __future__ import annotations

from itertools import count


def forget_rows(forget_share: float, batch_size: int) -> int:
    """Forget rows of a batch, round(forget_share · batch_size).

    Raises:
        ValueError: they are none or all of it; the message says what share or batch would do.
    """
    rows = round(forget_share * batch_size)
    if 0 < rows < batch_size:
        return rows
    some = "no forget rows" if rows == 0 else "forget rows alone"
    rarer = min(forget_share, 1 - forget_share)
    enough = next(n for n in count(max(2, int(0.5 / rarer))) if 0 < round(forget_share * n) < n)
    share = ""
    if batch_size > 1:
        share = f"a forget_share from {1 / batch_size:.6g} to {1 - 1 / batch_size:.6g}, or "
    raise ValueError(
        f"forget_share {forget_share:g} of batch_size {batch_size} makes batches of {some}; it "
        f"takes {share}a batch_size of at least {enough}"
    )
