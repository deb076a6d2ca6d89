"""`raysae world`: what a world is made of, in words and examples. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

from rich.console import Console
from rich.table import Table
from rich.text import Text

from raysae.errors import UserError
from raysae.worlds.spec import HubWorld, LocalWorld
from raysae.worlds.world import (
    FORGET_SET,
    WORLDS,
    Question,
    load_world,
    read_model_config,
    unknown_name,
    valid_hooks,
)

SHOWN_CHARACTERS = 300
LETTERS = "ABCD"


def describe_world(name: str | HubWorld | LocalWorld, examples: int, console: Console) -> None:
    """Print model, hook points, corpora and questions.

    Args:
        name: as in `raysae.worlds.load_world`.
        examples: how many texts of each corpus and questions of each set to show.
        console: to print to.

    Raises:
        UserError: there is no world of that name, or it cannot be fetched.
    """
    if isinstance(name, str) and name not in WORLDS:
        raise UserError(unknown_name("world", name, WORLDS))
    world = load_world(name)
    config = read_model_config(world.model_path)
    hooks = valid_hooks(world)
    size = sum(path.stat().st_size for path in world.model_path.glob("*.safetensors"))

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    say(f"world      {world.name}, fingerprint {world.fingerprint()[:16]}")
    say(
        f"model      {config.get('model_type', 'unknown')}: {config['num_hidden_layers']} layers, "
        f"d_in {config['hidden_size']}, vocabulary {config['vocab_size']}, {size / 1e6:.1f} MB; "
        f"{world.saebench_model_name} is asked in the format {world.prompt.name!r}"
    )
    say(f"hooks      {hooks[0]} to {hooks[-1]}; default {world.default_hook_name}")
    for kind, texts in (("forget", world.forget_texts), ("retain", world.retain_texts)):
        characters = sum(map(len, texts))
        say(f"{kind:<10} {len(texts):,} texts, {characters:,} characters, in sequences of "
            f"{world.seq_len} tokens")  # fmt: skip
        for text in islice(texts, examples):
            cut = text[:SHOWN_CHARACTERS] + ("…" if len(text) > SHOWN_CHARACTERS else "")
            say(f"           “{' '.join(cut.split())}”")
    console.print(_questions_table(world.questions, world.known_questions))
    orders = "all 24 orders" if world.permutations == 24 else f"{world.permutations} orders"
    say(f"known: answered right under {orders} of the choices")
    say("prompt, the answer being its next token:")
    say(repr(world.ask(FORGET_SET, 0)))
    for subject, questions in world.questions.items():
        for question in questions[:examples]:
            say(f"{subject}: {question.question}")
            for i, choice in enumerate(question.choices):
                say(f"    {LETTERS[i]} {choice}{'  ← right' if i == question.answer else ''}")


def _questions_table(
    questions: Mapping[str, tuple[Question, ...]], known: Mapping[str, tuple[int, ...]] | None
) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("questions", no_wrap=True)
    table.add_column("in all", justify="right")
    table.add_column("known", justify="right")
    table.add_column("", no_wrap=True)
    for subject, asked in questions.items():
        table.add_row(
            Text(subject),
            f"{len(asked)}",
            "when run" if known is None else f"{len(known[subject])}",
            "to forget" if subject == FORGET_SET else "to retain",
        )
    return table
