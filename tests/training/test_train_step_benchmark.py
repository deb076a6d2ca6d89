"""The benchmark of the training step runs where torch and SAELens are, and nothing of Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_it_measures_every_case_without_ray_and_saebench(tmp_path: Path):
    for name in ("ray", "sae_bench", "optuna", "sklearn"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('no {name} here')\n")
    command = [sys.executable, str(ROOT / "benchmarks" / "train_step.py")]
    options = "--sizes 16x128 --batch-size 32 --steps 2 --device cpu --dtype bfloat16 --members 2"
    methods = "--regularizers none importance grouped gradient_disentangled"
    done = subprocess.run(
        [*command, *options.split(), *methods.split()],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 6 * 4
    for architecture, method, figure, *rest in rows:
        if method == "grouped":
            assert figure == "not measured: no sklearn here"
        elif "matryoshka" in architecture and method == "gradient_disentangled":
            assert figure.startswith("refused: gradient_disentangled cannot work on")
        else:
            assert float(figure.split()[0]) > 0
            assert float(rest[0].replace(",", "")) > 0
            assert rest[1].endswith("%")
