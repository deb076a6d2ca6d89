"""A model folder, checked before anything is loaded from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from raysae.errors import UserError

ARCHITECTURES = ("Gemma2ForCausalLM", "GPTNeoXForCausalLM", "LlamaForCausalLM")
"""Those that `raysae.worlds.model` runs."""


def checked_config(folder: Path, field: str) -> dict[str, Any]:
    """Return config.json of a Hugging Face folder.

    Raises UserError naming `field`, the folder and what it lacks.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"{field}: {folder}: no such folder")
    if not path.is_file():
        found = sorted(entry.name for entry in folder.iterdir())[:8]
        raise UserError(
            f"{field}: {folder} is no Hugging Face model: it has no config.json (it has "
            f"{', '.join(found) or 'nothing'})"
        )
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{field}: {path} cannot be read: {error}") from None
    named = config.get("architectures") or []
    if not set(named) & set(ARCHITECTURES):
        raise UserError(
            f"{field}: {path}: architecture {', '.join(named) or '(none given)'} is not supported; "
            f"valid: {', '.join(ARCHITECTURES)}"
        )
    for name in ("num_hidden_layers", "hidden_size"):
        if not isinstance(config.get(name), int):
            raise UserError(f"{field}: {path} does not say {name!r}")
    return config


def check_model_folder(folder: Path, field: str) -> dict[str, Any]:
    """Return config.json of a folder with config, safetensors weights and tokenizer.

    Raises UserError naming `field`, the folder and what it lacks.
    """
    config = checked_config(folder, field)
    if not any(folder.glob("*.safetensors")):
        found = sorted(path.name for path in folder.glob("*.bin"))
        hint = (
            f" ({found[0]} is pickled: load it with transformers and save_pretrained)"
            if found
            else ""
        )
        raise UserError(f"{field}: {folder} has no *.safetensors weights{hint}")
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer.model").is_file():
        raise UserError(f"{field}: {folder} has no tokenizer (tokenizer.json or tokenizer.model)")
    return config


def check_same_shape(config: dict[str, Any], scored: dict[str, Any]) -> None:
    """Raise UserError unless an SAE of one model fits the other."""
    for name in ("hidden_size", "num_hidden_layers", "vocab_size"):
        if config.get(name) != scored.get(name):
            raise UserError(
                f"world.score_model has {name} {scored.get(name)}, world.model {config.get(name)}: "
                "an SAE of the one does not fit the other"
            )
