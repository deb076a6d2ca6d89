"""Worlds of the hub that go by a name, and the sizes of models whose config is not at hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from raysae.worlds import hub
from raysae.worlds.folder import checked_config
from raysae.worlds.spec import HubWorld, LocalWorld
from raysae.worlds.world import WORLDS, middle_hook

PRESETS: dict[str, HubWorld] = {
    # As SAEBench has it: SAEs of the base model, questions to the instruction-tuned one. Layer 19
    # is the seed study's.
    "gemma-2-2b": HubWorld(
        name="gemma-2-2b",
        model="google/gemma-2-2b",
        score_model="google/gemma-2-2b-it",
        hook="blocks.19.hook_resid_post",
        dtype="bfloat16",
        llm_batch_size=4,
        store_tokens=2_000_000,
    ),
    # Too weak for SAEBench's 24 orders of the choices; see search_spaces/pythia-70m.yaml.
    "pythia-70m": HubWorld(
        name="pythia-70m",
        model="EleutherAI/pythia-70m-deduped",
        hook="blocks.3.hook_resid_post",
        permutations=1,
        store_tokens=1_000_000,
    ),
}

assert set(WORLDS) == {"embedded", *PRESETS}


@dataclass(frozen=True)
class Shape:
    """What is known of a world before it is loaded, so that a plan needs no download."""

    label: str
    n_layers: int
    d_model: int
    default_hook_name: str
    store_tokens: int | None = None
    """Of either corpus, where the world limits them."""
    permutations: int = 24
    """Orders of the choices in which it is asked; 0: which questions it knows is known."""


EMBEDDED = Shape("embedded", 4, 128, "blocks.0.hook_resid_post", permutations=0)

SIZES = {
    "google/gemma-2-2b": (26, 2304),
    "google/gemma-2-9b": (42, 3584),
    "EleutherAI/pythia-70m": (6, 512),
    "EleutherAI/pythia-160m": (12, 768),
    "EleutherAI/pythia-410m": (24, 1024),
    "EleutherAI/pythia-1b": (16, 2048),
    "EleutherAI/pythia-1.4b": (24, 2048),
    "EleutherAI/pythia-2.8b": (32, 2560),
    "meta-llama/Llama-3.2-1B": (16, 2048),
    "meta-llama/Llama-3.2-3B": (28, 3072),
    "meta-llama/Llama-3.1-8B": (32, 4096),
}
"""Layers and width by repository, variants left out."""
PARAMETERS = {
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-2-9b": 9_241_705_984,
    "EleutherAI/pythia-70m": 70_426_624,
    "EleutherAI/pythia-160m": 162_322_944,
    "EleutherAI/pythia-410m": 405_334_016,
    "EleutherAI/pythia-1b": 1_011_781_632,
    "EleutherAI/pythia-1.4b": 1_414_647_808,
    "EleutherAI/pythia-2.8b": 2_775_208_960,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
}
"""As their files hold them."""
VARIANTS = ("-it", "-Instruct", "-deduped")


def shape_of(world: str | HubWorld | LocalWorld) -> Shape:
    """Return what is known of a world without loading it.

    Raises UserError where the model's config is neither on this machine nor to be had.
    """
    spec = PRESETS.get(world) if isinstance(world, str) else world
    if spec is None:
        return EMBEDDED
    n_layers, d_model = _size_of(spec)
    hook = spec.hook or middle_hook(n_layers)
    return Shape(spec.label, n_layers, d_model, hook, spec.store_tokens, spec.permutations)


def parameters_of(world: str | HubWorld | LocalWorld) -> tuple[int, str] | None:
    """Number of the model's parameters and the type in which they run; None: not known by name."""
    spec = PRESETS.get(world) if isinstance(world, str) else world
    parameters = None if spec is None else PARAMETERS.get(_base(spec.model))
    return None if spec is None or parameters is None else (parameters, spec.dtype)


def _base(model: str) -> str:
    for ending in VARIANTS:
        model = model.removesuffix(ending)
    return model


def _size_of(spec: HubWorld | LocalWorld) -> tuple[int, int]:
    """Layers and width: of the folder's config, of `SIZES`, or of the hub's config."""
    base = _base(spec.model)
    if base in SIZES and not Path(spec.model).is_dir():
        return SIZES[base]
    folder = hub.model_folder(spec, "model", config_only=True)
    config = checked_config(folder, "world.model")
    return int(config["num_hidden_layers"]), int(config["hidden_size"])


def label_of(world: object) -> str:
    """Name of a world as a run's config.yaml has it: a name, or a description's fields."""
    if isinstance(world, dict):
        return str(world.get("name") or str(world.get("model", "")).rstrip("/").split("/")[-1])
    return str(world)
