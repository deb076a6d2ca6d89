"""Names of what a trial leaves in its folder; imports nothing, so that anyone may know them."""

from __future__ import annotations

from pathlib import Path

SAE_FOLDER = "sae"
LAST_GOOD_FOLDER = "last_good_sae"
"""The SAE of a diverged trial, as it was when its loss was last sane."""
RESULT_FILE = "unlearning_eval_results.json"
TRIAL_FILE = "trial.json"


def trial_folder(run_dir: Path, number: int) -> Path:
    """`trials/NNNN` of a run folder."""
    return run_dir / "trials" / f"{number:04d}"


def seed_folder(folder: Path, index: int, seeds: int) -> Path:
    """Where a trial's SAE lies: in the trial's own folder if it is the only one."""
    return folder if seeds == 1 else folder / f"seed_{index}"
