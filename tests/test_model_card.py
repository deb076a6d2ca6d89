"""The best SAE's card says what the run folder says, and it can be pushed with one command."""

from __future__ import annotations

import json
import sys
from io import StringIO
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from rich.console import Console
from sae_bench.sae_bench_utils.general_utils import load_and_format_sae
from sae_lens import SAE, TopKSAE, TopKSAEConfig

from raysae import cli
from raysae.analysis.confirmation import COLUMNS
from raysae.errors import UserError
from raysae.model_card import write_card
from raysae.push import push_best
from raysae.search.conclude import copy_best
from raysae.unlearning import halve, split_questions

VERDICTS = (
    ",".join(COLUMNS)
    + """
1,none,2,0.3,0.2,0.1,0.05,0.15,0.01,0.02,2,True,False,0.25,0.24,0.01,-0.1,0.12,0.4,0.4,1,False,False
1,fixed_orthogonal,2,0.3,0.35,-0.05,-0.1,0.02,0.3,0.3,0,False,False,,,,,,,,,,
7,none,2,0.9,0.2,0.7,0.6,0.8,0.01,0.02,2,True,False,,,,,,,,,,
"""
)


@pytest.fixture
def run_dir(tmp_path: Path, make_spec, fake_result) -> Path:
    """A search of three trials and a confirmation of the best, number 1, made up."""
    folder = tmp_path / "orth-1"
    folder.mkdir()
    metrics = {"l0": 4.0, "explained_variance": 0.9876, "dead_features": 3.0}
    records = []
    for number, (score, stage, run) in enumerate(
        [(0.1, "search", ""), (0.25, "search", ""), (0.2, "search", ""),
         (0.3125, "confirmation", "trial 1"), (0.2875, "confirmation", "trial 1"),
         (0.2, "confirmation", "none beside topk k=4, 24 steps [abcd]")]
    ):  # fmt: skip
        spec = make_spec(
            "topk", "importance", {"ema": 0.9}, alpha=0.5, number=number, stage=stage, run=run
        )
        result = fake_result(score)
        halves = halve(result, 0)
        rung = {"step": 24, "tokens": 1536, "metrics": metrics, "result": result.to_dict()}
        rung |= {"score": halves.search.score, "heldout_score": score, "saebench_score": score}
        record = {"event": "end", "trial": number, "state": "finished", "spec": spec.to_dict()}
        records.append(record | {"error": "", "rung": rung | {"halves": halves.to_dict()}})
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "journal.jsonl").write_text(text)
    (folder / "config.yaml").write_text("world: embedded\nhook: blocks.0.hook_resid_post\n")
    versions = dict.fromkeys(("raysae", "sae-lens", "sae-bench", "torch", "ray"), "1.2.3")
    (folder / "about.json").write_text(json.dumps({"versions": versions}))
    (folder / "confirmation.csv").write_text(VERDICTS)
    trial = folder / "trials" / "0001"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sae = TopKSAE(TopKSAEConfig(d_in=16, d_sae=32, k=4))
    sae.W_dec.data /= sae.W_dec.data.norm(dim=1, keepdim=True)
    sae.cfg.metadata.hook_name = "blocks.0.hook_resid_post"
    sae.cfg.metadata.model_name = "gemma-2-2b-it"
    sae.save_model(trial / "sae")
    (trial / "unlearning_eval_results.json").write_text("{}")
    about = {"spec": records[1]["spec"], "training_steps": 24, "tokens": 1536}
    (trial / "trial.json").write_text(json.dumps(about))
    copy_best(folder, records[1])
    return folder


@pytest.fixture
def console() -> Console:
    return Console(file=StringIO(), width=200)


def lines(run_dir: Path, **options: str) -> list[str]:
    return write_card(run_dir, **options).read_text(encoding="utf-8").splitlines()


# --- The card -------------------------------------------------------------------------------------


def test_the_hub_reads_the_front_matter(run_dir: Path):
    card = ModelCard.load(write_card(run_dir))
    assert card.data.library_name == "saelens"
    assert card.data.license == "apache-2.0"
    assert "sparse-autoencoder" in card.data.tags
    assert card.data.base_model is None
    results = {result.dataset_split: result for result in card.data.eval_results}
    journal = [json.loads(line) for line in (run_dir / "journal.jsonl").read_text().splitlines()]
    halves = journal[1]["rung"]["halves"]
    assert results["search"].metric_value == round(halves["search"]["score"], 4)
    assert results["heldout"].metric_value == round(halves["heldout"]["score"], 4)
    assert results["transferred"].metric_value == round(halves["transferred"]["score"], 4)
    assert results["all"].metric_value == 0.25
    assert {result.metric_type for result in results.values()} == {"unlearning_score"}


def test_the_card_says_what_it_is_and_how_it_was_trained(run_dir: Path):
    text = "\n".join(lines(run_dir))
    for words in (
        "# SAE of orth-1: importance α=0.5 constant k=4",
        "the best of 3 trials of a search",
        "`blocks.0.hook_resid_post`",
        "| regularizer | importance (ema 0.9) |",
        "| α | 0.5, constant |",
        "| training | 24 steps of 64 activations, Adam",
        "topk, d_in 16, d_sae 32",
        "sae-lens 1.2.3",
        'SAE.load_from_disk("best")',
        "Explained variance 0.9876, 3 dead features of 32",
    ):
        assert words in text
    assert str(run_dir) not in text


def test_scores_have_the_intervals_of_their_questions(run_dir: Path):
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(75, 100, method="wilson")
    wanted = f"| all questions, SAEBench's own score | 0.250 | [{1 - high:.3f}, {1 - low:.3f}] |"
    assert wanted in lines(run_dir)


def test_an_sae_that_was_stopped_early_has_the_one_score_that_it_has(run_dir: Path, fake_result):
    path = run_dir / "journal.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    whole = fake_result(0.25)
    counts = {name: len(known) for name, known in whole.baseline.items()}
    half = whole.on(split_questions(counts, 0))
    rung = records[1]["rung"]
    rung |= {"questions": "search half", "heldout_score": None, "saebench_score": None}
    rung |= {"score": half.score, "halves": halve(half, 0).to_dict(), "result": half.to_dict()}
    records[1]["state"] = "stopped"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    card = ModelCard.load(write_card(run_dir))
    (only,) = card.data.eval_results
    assert (only.dataset_split, only.metric_value) == ("search", round(half.score, 4))
    assert "held-out questions |" not in card.text and "all questions" not in card.text
    assert f"On the questions that the search saw: {half.cause}." in card.text
    assert "stopped at step 24: scored on the questions searched on alone" in card.text


def test_the_confirmation_is_told_whichever_way_it_went(run_dir: Path):
    text = "\n".join(lines(run_dir))
    assert (
        "gives p < 0.05, after Holm's correction for all comparisons of the confirmation." in text
    )
    assert "2 other seeds, on held-out questions: 0.312, 0.287 (mean 0.300)" in text
    assert (
        "| none | 0.200 | +0.100 [+0.050, +0.150] | p 0.01 (Holm 0.02) | 2 of 2 seeds | beats it |"
        in text
    )
    worse = (
        "| -0.050 [-0.100, +0.020] | p 0.3 (Holm 0.3) | 0 of 2 seeds | is not shown to beat it |"
    )
    assert f"| fixed_orthogonal | 0.350 {worse}" in text
    assert "0.900" not in text  # another candidate's
    caution = "Caution, by the transferred score it is not shown to beat it: 0.250 against 0.240"
    assert f"- none: {caution}" in text
    assert "- fixed_orthogonal:" not in text  # without a transferred score


def test_a_run_from_before_transferred_scores_has_a_card_without_them(run_dir: Path):
    path = run_dir / "journal.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    counts = {"forget_correct", "forget_total", "retain_correct", "retain_total"}
    for record in records:
        found = record["rung"]["halves"]["transferred"]
        for name in set(found) - counts:
            del found[name]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    table = run_dir / "confirmation.csv"
    rows = [line.split(",") for line in table.read_text().splitlines()]
    corrected = rows[0].index("p_holm")
    old = [",".join(row[:corrected] + row[corrected + 1 : 13]) for row in rows]
    table.write_text("\n".join(old) + "\n")
    card = ModelCard.load(write_card(run_dir))
    assert {r.dataset_split for r in card.data.eval_results} == {"search", "heldout", "all"}
    assert "held-out forget questions right" in card.text
    assert "ransferred" not in card.text
    assert "| none | 0.200 | +0.100 [+0.050, +0.150] | p 0.01 | 2 of 2 seeds |" in card.text
    assert "gives p < 0.05." in card.text


def test_a_candidate_that_is_worse_is_not_only_not_shown_to_be_better(run_dir: Path):
    table = run_dir / "confirmation.csv"
    table.write_text(table.read_text().replace(",0.3,0.3,0,False,False", ",0.01,0.02,0,False,True"))
    (row,) = (line for line in lines(run_dir) if line.startswith("| fixed_orthogonal"))
    assert row.endswith("| is worse than it |")


def test_an_sae_that_was_not_confirmed_says_so(run_dir: Path):
    (run_dir / "confirmation.csv").unlink()
    journal = run_dir / "journal.jsonl"
    kept = journal.read_text().splitlines()[:3]
    journal.write_text("\n".join(kept) + "\n")
    text = "\n".join(lines(run_dir))
    assert "it was not trained again with other seeds" in text
    assert "beats it" not in text


def test_the_best_of_a_study_shows_the_other_seeds_of_its_run(run_dir: Path):
    journal = run_dir / "journal.jsonl"
    records = [json.loads(line) for line in journal.read_text().splitlines()][:3]
    for record, name in zip(records, ("a", "b", "b"), strict=True):
        record["spec"]["run"] = name
    journal.write_text("".join(json.dumps(record) + "\n" for record in records))
    trial = {"spec": records[1]["spec"], "training_steps": 24}
    (run_dir / "best" / "trial.json").write_text(json.dumps(trial))
    (run_dir / "confirmation.csv").unlink()
    text = "\n".join(lines(run_dir))
    assert "the best of 3 trials of a study (run `b`)" in text
    assert "with 1 other seeds, on held-out questions: 0.200 (mean 0.200)" in text
    assert "Beside baselines" not in text


def test_a_world_of_the_hub_names_its_model_and_claims_no_licence(run_dir: Path):
    (run_dir / "config.yaml").write_text("world: gemma-2-2b\nhook: blocks.19.hook_resid_post\n")
    card = ModelCard.load(write_card(run_dir))
    assert card.data.base_model == "google/gemma-2-2b"
    assert card.data.license is None
    assert "toy" not in card.text


def test_sae_lens_and_saebench_load_the_folder_with_its_card_as_they_load_the_trials(run_dir: Path):
    write_card(run_dir)
    best = SAE.load_from_disk(run_dir / "best")
    trained = SAE.load_from_disk(run_dir / "trials" / "0001" / "sae")
    for name, weight in trained.state_dict().items():
        assert torch.equal(best.state_dict()[name], weight), name
    loaded = load_and_format_sae("raysae", best, "cpu")
    assert loaded is not None and loaded[1] is best


# --- The push -------------------------------------------------------------------------------------


class FakeHub:
    """Stands in for HfApi: keeps the files that a repository would have."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.private: bool | None = None
        self.token = ""
        self.error: Exception | None = None

    def __call__(self, token: str) -> FakeHub:
        self.token = token
        return self

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        if self.error is not None:
            raise self.error
        self.private = private

    def upload_folder(
        self,
        *,
        repo_id: str,
        folder_path: Path,
        path_in_repo: str,
        ignore_patterns: list[str],
        commit_message: str,
    ) -> None:
        for path in folder_path.iterdir():
            if path.name not in ignore_patterns:
                self.files[f"{path_in_repo}/{path.name}"] = path.read_bytes()

    def upload_file(
        self, *, repo_id: str, path_or_fileobj: Path, path_in_repo: str, commit_message: str
    ) -> None:
        self.files[path_in_repo] = path_or_fileobj.read_bytes()


@pytest.fixture
def hub(monkeypatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr("huggingface_hub.HfApi", fake)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    return fake


def test_what_is_pushed_is_what_sae_lens_looks_for(
    run_dir: Path, hub: FakeHub, console: Console, tmp_path: Path
):
    assert push_best(run_dir, "me/sae", console) == "https://huggingface.co/me/sae"
    assert (hub.token, hub.private) == ("hf_secret", True)
    assert set(hub.files) >= {"README.md", "sae/cfg.json", "sae/sae_weights.safetensors"}
    assert "sae/README.md" not in hub.files
    card = hub.files["README.md"].decode()
    assert 'SAE.from_pretrained("me/sae", "sae")' in card
    assert "hf_secret" not in card
    folder = tmp_path / "downloaded"
    folder.mkdir()
    for name in ("cfg.json", "sae_weights.safetensors"):
        (folder / name).write_bytes(hub.files[f"sae/{name}"])
    assert SAE.load_from_disk(folder).cfg.d_sae == 32


def test_a_repository_can_be_made_public(run_dir: Path, hub: FakeHub, console: Console):
    push_best(run_dir, "me/sae", console, private=False)
    assert hub.private is False


@pytest.mark.parametrize("name", ["sae", "me/sae/more", "me/sa e", "me/"])
def test_a_bad_name_is_refused(name: str, run_dir: Path, hub: FakeHub, console: Console):
    with pytest.raises(UserError, match="no name of a repository"):
        push_best(run_dir, name, console)
    assert hub.files == {}


def test_without_a_token_it_says_how_to_get_one(
    run_dir: Path, hub: FakeHub, console: Console, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match=r"hf auth login.*HF_TOKEN"):
        push_best(run_dir, "me/sae", console)
    assert hub.files == {}


def test_a_folder_without_a_best_sae_is_refused(tmp_path: Path, console: Console):
    with pytest.raises(UserError, match="no best SAE there"):
        push_best(tmp_path, "me/sae", console)


@pytest.mark.parametrize("error", [OSError("no route to host"), None], ids=["network", "hub"])
def test_what_the_hub_refuses_is_one_message(
    error: Exception | None, run_dir: Path, hub: FakeHub, console: Console
):
    import httpx

    response = httpx.Response(403, request=httpx.Request("POST", "https://huggingface.co/api"))
    hub.error = error or HfHubHTTPError("403 Forbidden: no rights\nmore", response=response)
    with pytest.raises(UserError, match=r"^me/sae: the hub refuses: (no route|403)") as caught:
        push_best(run_dir, "me/sae", console)
    assert "\n" not in str(caught.value)


def test_the_command_pushes(run_dir: Path, hub: FakeHub, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["raysae", "push", str(run_dir), "me/sae", "--public"])
    with pytest.raises(SystemExit) as caught:
        cli.commands()
    assert caught.value.code == 0
    assert "https://huggingface.co/me/sae" in capsys.readouterr().out
    assert "sae/cfg.json" in hub.files
