"""The benchmark of a score runs on a random model, and needs nothing of Ray."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_it_compares_both_evaluators_on_a_random_model(tmp_path: Path) -> None:
    (tmp_path / "ray.py").write_text("raise ImportError('no ray here')\n")
    command = [sys.executable, str(ROOT / "benchmarks" / "unlearning_eval.py")]
    options = "--model gemma-2-tiny --layers 2 --forget 24 --retain 24 --repeats 2"
    done = subprocess.run(
        [*command, *options.split(), "--saebench-repeats", "1", "--dtype", "float32"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^((?:topk|jumprelu) 4) +(.*)$", done.stdout, re.MULTILINE)
    assert [name for name, _ in rows] == ["topk 4", "jumprelu 4"]
    for _, row in rows:
        slow, _, fast, *_, equal, answers, sparsities = row.split()
        assert float(fast) < float(slow)
        assert (equal, answers, sparsities) == ("True", "0", "0")
    turned = re.findall(r"([\d.]+)% of the answers are turned", done.stdout)
    assert len(turned) == 2 and all(float(share) > 1 for share in turned)
