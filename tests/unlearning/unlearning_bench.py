"""A small cut of a world, the evaluators on it, and SAEs trained by a plain loop."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from sae_bench.evals.unlearning.eval_config import UnlearningEvalConfig
from sae_lens import (
    SAE,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)
from torch import Tensor
from transformer_lens import HookedTransformer

from raysae.unlearning import (
    CachedEvaluator,
    EvaluationCache,
    SAEBenchEvaluator,
    default_eval_config,
)
from raysae.worlds import World
from raysae.worlds.world import FORGET_SET, RETAIN_SETS

D_SAE = 256


def cut(world: World, n_forget: int, n_retain: int, n_texts: int) -> World:
    """The first known questions of each data set and the first texts of each corpus."""
    assert world.known_questions is not None
    sizes = {FORGET_SET: n_forget} | dict.fromkeys(RETAIN_SETS, n_retain)
    questions = {
        name: tuple(world.questions[name][i] for i in world.known_questions[name][:size])
        for name, size in sizes.items()
    }
    return replace(
        world,
        forget_texts=world.forget_texts[:n_texts],
        retain_texts=world.retain_texts[:n_texts],
        questions=questions,
        known_questions={name: tuple(range(len(qs))) for name, qs in questions.items()},
    )


@dataclass
class Bench:
    """A world with everything an evaluation needs."""

    world: World
    model: HookedTransformer
    config: UnlearningEvalConfig
    cache: EvaluationCache
    work_dir: Path

    @property
    def hook_name(self) -> str:
        return self.world.default_hook_name

    def cached(self, **changes: Any) -> CachedEvaluator:
        """The fast evaluator; `changes` alter the configuration (not what the cache holds)."""
        config = default_eval_config(self.world, **changes)
        cache = replace(self.cache, config=self.cache.config | changes)
        return CachedEvaluator(self.world, self.model, cache, config)

    def saebench(self, **changes: Any) -> SAEBenchEvaluator:
        config = default_eval_config(self.world, **changes)
        return SAEBenchEvaluator(self.world, self.model, self.hook_name, config, self.work_dir)


def make_sae(architecture: str, weights: dict[str, Tensor], k: int = 4) -> SAE[Any]:
    """An inference SAE of SAELens with unit-norm decoder rows."""
    norms = weights["W_dec"].norm(dim=1).clamp_min(1e-8)
    state = {
        "W_enc": weights["W_enc"] * norms,
        "b_enc": weights["b_enc"] * norms,
        "W_dec": weights["W_dec"] / norms[:, None],
        "b_dec": weights["b_dec"],
    }
    sizes = {"d_in": state["W_enc"].shape[0], "d_sae": state["W_enc"].shape[1]}
    sae: SAE[Any]
    if architecture == "standard":
        sae = StandardSAE(StandardSAEConfig(**sizes))
    elif architecture == "topk":
        sae = TopKSAE(TopKSAEConfig(**sizes, k=k))
    else:
        sae = JumpReLUSAE(JumpReLUSAEConfig(**sizes))
        state["threshold"] = torch.full((sizes["d_sae"],), 5.0)
    sae.load_state_dict(state)
    return sae


def random_weights(rows: Tensor, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(
        torch.randn(D_SAE, rows.shape[1], generator=generator), dim=1
    )
    # A negative bias makes the random features sparse enough for some to be eligible.
    b_enc = torch.full((D_SAE,), -2.5 * float(rows.std()))
    return {"W_enc": W_dec.T.clone(), "W_dec": W_dec, "b_enc": b_enc, "b_dec": rows.mean(0)}


def train(rows: Tensor, *, topk: int | None, steps: int = 300) -> dict[str, Tensor]:
    """Adam on squared error, with an L1 penalty or the k largest activations."""
    generator = torch.Generator().manual_seed(1)
    scale = rows.pow(2).mean().sqrt()
    x_all = rows / scale
    params = {n: w.clone().requires_grad_() for n, w in random_weights(x_all).items()}
    optimizer = torch.optim.Adam(params.values(), lr=2e-3)
    for _ in range(steps):
        x = x_all[torch.randint(len(x_all), (512,), generator=generator)]
        acts = torch.relu((x - params["b_dec"]) @ params["W_enc"] + params["b_enc"])
        if topk:
            top = acts.topk(topk, dim=-1)
            acts = torch.zeros_like(acts).scatter(-1, top.indices, top.values)
        loss = (acts @ params["W_dec"] + params["b_dec"] - x).pow(2).sum(-1).mean()
        if not topk:
            loss = loss + 2.0 * (acts * params["W_dec"].norm(dim=1)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained = {name: p.detach() for name, p in params.items()}
    return trained | {"b_enc": trained["b_enc"] * scale, "b_dec": trained["b_dec"] * scale}
