"""Build the embedded world: ``python -m raysae.worlds.embedded.build [--out DIR]``.

Trains the language model, brings its residual stream to the length SAEBench's multipliers are
meant for, writes weights (fp16), tokenizer and the ids of the questions the model knows. One CPU
thread, eight to ten minutes. Everything is seeded and counted in steps: the same machine
gives the same bytes; another one may differ in the last bits of the weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import Gemma2ForCausalLM, PreTrainedTokenizerFast

from raysae.worlds.embedded import (
    DATA,
    HOOK_LAYER,
    KNOWN_QUESTIONS_FILE,
    without_known_questions,
)
from raysae.worlds.embedded.facts import make_facts
from raysae.worlds.embedded.known_questions import find_known_questions, write_known_questions
from raysae.worlds.embedded.language_model import mean_residual_norm, rescale_residual
from raysae.worlds.embedded.tokenizer import make_tokenizer
from raysae.worlds.embedded.training import COMPOSE, FACTS, TOPICS, Stage, train_model
from raysae.worlds.model import load_model

MEAN_NORM = 100.0
"""Mean length of the residual stream at the hook, over the corpora. SAEBench clamps features to
-25 to -200 whatever the model, so that this decides how strong its interventions are."""

Stages = tuple[Stage, Stage, Stage]


def build(
    folder: Path, stages: Stages = (FACTS, COMPOSE, TOPICS), console: Console | None = None
) -> dict[str, int]:
    """Build the world in `folder` and return the number of known questions by data set."""
    console = console or Console()
    tokenizer = make_tokenizer()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums are grouped by thread: another count gives other last bits
    try:
        model = _train(tokenizer, stages, console)
        model = _at_mean_norm(model, tokenizer, folder, console)
        folder.mkdir(parents=True, exist_ok=True)
        model.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        world = without_known_questions(folder)
        with console.status("asking all questions under all 24 permutations"):
            ids = find_known_questions(load_model(world), world)
    finally:
        torch.set_num_threads(threads)
    write_known_questions(folder / KNOWN_QUESTIONS_FILE, ids, world)
    known = {name: len(known_ids) for name, known_ids in ids["correct"].items()}
    for name, count in known.items():
        console.print(f"{name}: {count} of {len(world.questions[name])} questions known")
    return known


def _train(
    tokenizer: PreTrainedTokenizerFast, stages: Stages, console: Console
) -> Gemma2ForCausalLM:
    columns = (
        TextColumn("{task.description:<8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        tasks = {
            stage: progress.add_task(stage.name, total=stage.steps, start=False, loss=float("nan"))
            for stage in stages
        }

        def on_step(stage: Stage, done: int, loss: float) -> None:
            if done == 1:
                progress.start_task(tasks[stage])
            progress.update(tasks[stage], completed=done, loss=loss)

        return train_model(make_facts(), tokenizer, stages, on_step=on_step)


def _at_mean_norm(
    model: Gemma2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, console: Console
) -> Gemma2ForCausalLM:
    world = without_known_questions(folder)
    texts = [*world.forget_texts, *world.retain_texts]
    stream = tokenizer("<eos>".join(texts))["input_ids"]
    n_sequences = len(stream) // world.seq_len
    tokens = torch.tensor(stream[: n_sequences * world.seq_len]).view(n_sequences, -1)
    tokens[:, 0] = tokenizer.bos_token_id  # as SAEBench does
    norm = mean_residual_norm(model, tokens, HOOK_LAYER)
    console.print(f"mean norm at the hook {norm:.2f}, rescaled to {MEAN_NORM:g}")
    return rescale_residual(model, MEAN_NORM / norm)


def main() -> None:
    """Read the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=DATA, help="folder to write to (the package's own)"
    )
    build(parser.parse_args().out)


if __name__ == "__main__":
    main()
