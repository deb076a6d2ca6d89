"""Where the embedded world's knowledge flows: ``python -m benchmarks.world_ablation``.

At one hook at a time, the residual stream at one class of positions (the name's second syllable,
the question mark, ...) is replaced by its mean over all positions but the first and all prompts.
Accuracy that falls says that the layers after the hook read the answer, or what leads to it, there.
An autoencoder at a hook can only unlearn what the hook carries. Chance is 0.25.
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformer_lens import HookedTransformer

from raysae.worlds import World, load_world
from raysae.worlds.embedded.facts import POOLS, SUBJECTS, SYLLABLES, make_facts
from raysae.worlds.embedded.text import exam_prompt
from raysae.worlds.model import load_model
from raysae.worlds.world import FORGET_SET, valid_hooks


def position_classes(tokens: Tensor, last: Tensor, ids: dict[str, int]) -> dict[str, Tensor]:
    """Return masks (prompts, positions) by the name of the class of positions.

    `tokens` is (prompts, positions), `last` (prompts,) the position whose logits are the answer.
    """

    def holds(words: set[str] | tuple[str, ...]) -> Tensor:
        return torch.isin(tokens, torch.tensor([ids[word] for word in words]))

    syllable = holds(SYLLABLES)
    nth = syllable.cumsum(dim=1)
    relation = holds({fact.relation.name for fact in make_facts()})
    # Relations and pools share a few words; before the first choice they are the question's.
    letters = holds(("\nA.", "\nB.", "\nC.", "\nD."))
    in_choices = letters.cumsum(dim=1) > 0
    mark = holds(("?",))
    positions = torch.arange(tokens.shape[1])
    return {
        "first syllable": syllable & (nth == 1),
        "second syllable": syllable & (nth == 2),
        "relation": relation & ~in_choices,
        "question mark": mark,
        "name, relation, mark": (syllable | relation | mark) & ~in_choices,
        "subject word": holds((SUBJECTS[FORGET_SET],)),
        "choices' letters": letters,
        "choices": holds({value for pool in POOLS.values() for value in pool}) & in_choices,
        "end of question": holds(("<end_of_turn>",)),
        "last": positions == last[:, None],
    }


@torch.no_grad()
def accuracies(model: HookedTransformer, world: World, n_questions: int) -> dict[str, list[float]]:
    """Return the accuracy on questions to forget by class of positions, one per valid hook."""
    tokenizer = model.tokenizer
    ids = tokenizer.get_vocab()
    questions = [
        world.questions[FORGET_SET][i] for i in world.known_questions[FORGET_SET][:n_questions]
    ]
    prompts = [exam_prompt(SUBJECTS[FORGET_SET], q.question, q.choices) for q in questions]
    tokens = tokenizer(prompts, return_tensors="pt", padding=True)["input_ids"]
    last = (tokens != tokenizer.pad_token_id).sum(dim=1) - 1
    right = torch.tensor([question.answer for question in questions])
    letters = [ids[letter] for letter in "ABCD"]

    def accuracy(hooks: list) -> float:
        logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
        chosen = logits[torch.arange(len(tokens)), last][:, letters].argmax(dim=-1)
        return (chosen == right).float().mean().item()

    def replace_by_mean(mask: Tensor):
        def hook(residual: Tensor, hook) -> Tensor:
            del hook
            real = (tokens != tokenizer.pad_token_id) & (tokens != tokenizer.bos_token_id)
            return torch.where(mask[..., None], residual[real].mean(dim=0), residual)

        return hook

    hook_names = valid_hooks(world)
    table = {"nothing": [accuracy([])] * len(hook_names)}
    for name, mask in position_classes(tokens, last, ids).items():
        table[name] = [accuracy([(hook, replace_by_mean(mask))]) for hook in hook_names]
    return table


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=480, help="at most (default: 480)")
    world = load_world("embedded")
    table = Table(
        "replaced by the mean", *valid_hooks(world), title="Accuracy, questions to forget"
    )
    for name, row in accuracies(load_model(world), world, parser.parse_args().questions).items():
        table.add_row(name, *(f"{value:.2f}" for value in row))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
