"""`raysae evaluate`: the evaluator's score with its reasons, or one message."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from unlearning_bench import Bench, GetSAE

import raysae.evaluate
from raysae import cli
from raysae.unlearning import halve


@dataclass
class Ended:
    code: int
    out: str
    err: str


@pytest.fixture
def command(bench: Bench, monkeypatch, capsys) -> Callable[..., Ended]:
    """`raysae evaluate` with these arguments, on the small cut of the embedded world."""
    monkeypatch.setattr(raysae.evaluate, "load_world", lambda _: bench.world)

    def call(*arguments: str | Path) -> Ended:
        monkeypatch.setattr(sys, "argv", ["raysae", "evaluate", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.commands()
        out, err = capsys.readouterr()
        return Ended(int(caught.value.code or 0), out, err)

    return call


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """The folder of an SAE, after SAELens wrote it there."""

    def save(sae: SAE[Any], **metadata: str) -> Path:
        folder = tmp_path / "sae"
        for name, value in metadata.items():
            setattr(sae.cfg.metadata, name, value)
        sae.save_model(folder)
        return folder

    return save


def assert_refused(ended: Ended, *parts: str) -> None:
    assert ended.code == 2
    assert ended.err.startswith("error: ")
    assert [part for part in parts if part not in ended.err] == []
    assert "Traceback" not in ended.err
    assert len(ended.err.splitlines()) == 1
    assert "score" not in ended.out


# --- A good SAE -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected(bench: Bench, sae_of: GetSAE) -> Any:
    """What the evaluator itself says of the SAE."""
    return bench.cached().evaluate(sae_of("topk", True), training_steps=1)


@pytest.mark.parametrize("evaluator", ["cached", "saebench"])
def test_the_score_is_the_evaluators_with_its_cause_and_its_halves(
    evaluator: str, command, saved, sae_of: GetSAE, expected, tmp_path: Path
):
    out = tmp_path / "results" / "result.json"
    folder = saved(sae_of("topk", True))
    ended = command(folder, "--evaluator", evaluator, "--split-seed", "3", "--out", out)
    assert ended.code == 0, ended.err
    assert expected.score > 0, "the SAE must be one whose score can be wrong"
    assert f"SAEBench unlearning score {expected.score:.4f} (ok): {expected.cause}" in ended.out
    halves = halve(expected, 3)
    assert f"{halves.search.score:.4f} (searched on) and {halves.heldout.score:.4f}" in ended.out
    moved = halves.transferred
    assert f"{moved.score:.4f} ({moved.status}): {moved.cause}" in ended.out
    rows = [line for line in ended.out.splitlines() if line.lstrip().startswith("0.0")]
    assert len(rows) == len(expected.interventions)
    assert sum(row.endswith("the score") for row in rows) == 1
    written = json.loads(out.read_text())["eval_result_metrics"]["unlearning"]
    assert written["unlearning_score"] == expected.score


def test_what_a_trials_file_says_beside_the_sae_counts_as_its_training(
    command, saved, sae_of: GetSAE
):
    folder = saved(sae_of("topk", True))
    (folder / "trial.json").write_text(json.dumps({"training_steps": 0}))
    ended = command(folder)
    assert ended.code == 0
    assert "0.0000 (untrained)" in ended.out


def test_the_hook_is_the_one_that_the_sae_was_made_for(command, saved, sae_of: GetSAE):
    folder = saved(sae_of("topk", True), hook_name="blocks.2.hook_resid_post")
    ended = command(folder)
    assert ended.code == 0, ended.err
    assert "at blocks.2.hook_resid_post of embedded" in ended.out


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu", "topk"])
def test_decoder_norms_are_folded_into_the_encoder_and_the_score_stays(
    architecture: str, command, saved, sae_of: GetSAE, bench: Bench
):
    """The same function written with other norms; a power of 2, so that nothing is rounded."""
    sae = sae_of(architecture, True)
    expected = bench.cached().evaluate(sae, training_steps=1)
    assert expected.score > 0, "the SAE must be one whose score can be wrong"
    norms = 2.0 ** (torch.arange(len(sae.W_dec)) % 4 - 2)
    sae.W_dec.data *= norms[:, None]
    if architecture == "topk":
        sae.cfg.rescale_acts_by_decoder_norm = True  # chosen by activation times norm
    sae.W_enc.data /= norms
    for name in ("b_enc", "threshold", "b_gate", "b_mag"):
        if hasattr(sae, name):
            getattr(sae, name).data /= norms
    with pytest.raises(ValueError, match="decoder rows must have norm 1"):
        bench.cached().evaluate(sae, training_steps=1)
    ended = command(saved(sae))
    assert ended.code == 0, ended.err
    assert "decoder rows of norms from 0.25 to 2 were folded into the encoder" in ended.out
    assert f"score {expected.score:.4f} ({expected.status}): {expected.cause}" in ended.out


# --- Refused --------------------------------------------------------------------------------------


def test_a_folder_that_is_no_sae_is_refused_with_one_below_it(
    command, saved, sae_of: GetSAE, tmp_path: Path
):
    assert_refused(command(tmp_path / "nowhere"), "nowhere: no SAELens SAE there", "cfg.json")
    folder = saved(sae_of("topk", True))
    assert_refused(command(tmp_path), f"did you mean {folder}?")
    trial = tmp_path / "trials" / "0001"  # as a search leaves them
    for seed in range(5):
        shutil.copytree(folder, trial / f"seed_{seed}" / "sae")
    named = ", ".join(str(trial / f"seed_{seed}" / "sae") for seed in range(3))
    assert_refused(command(trial / "sae"), "no SAELens SAE there (a folder with cfg.json)\n")
    assert_refused(command(trial), f"did you mean {named} or another of 5 below it?")


@pytest.mark.parametrize("broken", ["cfg.json", "sae_weights.safetensors"])
def test_an_sae_whose_files_are_broken_is_refused(broken: str, command, saved, sae_of: GetSAE):
    folder = saved(sae_of("topk", True))
    (folder / broken).write_bytes(b"{}")
    assert_refused(command(folder), str(folder), "cannot be loaded by SAELens")


def test_an_sae_of_another_width_is_refused(command, saved, sae_of: GetSAE, bench: Bench):
    sae = sae_of("standard", False)
    width = sae.cfg.d_in
    sae.cfg.d_in = width // 2
    for name in ("W_enc", "W_dec", "b_dec"):
        weight = getattr(sae, name).data
        half = weight[: width // 2] if name == "W_enc" else weight[..., : width // 2]
        setattr(sae, name, torch.nn.Parameter(half.clone()))
    message = (
        f"d_in {width // 2}, the residual stream of the world {bench.world.name!r} has {width}"
    )
    assert_refused(command(saved(sae)), message, "belongs to another model")


def test_decoder_norms_that_cannot_be_folded_are_refused(command, saved, sae_of: GetSAE):
    sae = sae_of("topk", True)
    sae.W_dec.data[3] *= 2
    assert_refused(command(saved(sae)), "norms from 1 to 2, which SAELens cannot fold into the enc")
    sae = sae_of("standard", True)
    sae.W_dec.data[3] = 0
    assert_refused(command(saved(sae)), "norms from 0 to 1: a row of zeros has no direction")


def test_an_sae_of_another_hook_or_model_is_refused(command, saved, sae_of: GetSAE):
    folder = saved(sae_of("topk", True), hook_name="blocks.1.hook_resid_post")
    wanted = "evaluation is for 'blocks.0.hook_resid_post'"
    ended = command(folder, "--hook", "blocks.0.hook_resid_post")
    assert_refused(ended, "made for hook_name 'blocks.1.hook_resid_post'", wanted)
    folder = saved(sae_of("topk", True), hook_name="blocks.9.hook_resid_post")
    assert_refused(command(folder), "made for hook_name 'blocks.9", "valid are 'blocks.0.hook_res")
    folder = saved(sae_of("topk", True), model_name="gpt2")
    assert_refused(command(folder), "made for model_name 'gpt2'")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--hook", "blocks.7.hook_resid_post"], ["--hook", "blocks.0.hook_resid_post"]),
        (["--world", "embeded"], ["--world", "Did you mean 'embedded'?"]),
        (["--evaluator", "fast"], ["--evaluator", "'cached', 'saebench'"]),
    ],
    ids=lambda value: value[0],
)
def test_an_unknown_name_is_refused_with_the_valid_ones(
    options: list[str], parts: list[str], command, tmp_path: Path
):
    assert_refused(command(tmp_path, *options), *parts)
