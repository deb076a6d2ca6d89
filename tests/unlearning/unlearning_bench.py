"""A small cut of a world, the evaluators on it, and SAEs trained by a plain loop."""

from __future__ import annotations

import functools
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
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
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor
from transformer_lens import HookedTransformer

from raysae.training.saes import export_sae, make_training_sae
from raysae.training.spec import SAESpec
from raysae.unlearning import (
    CachedEvaluator,
    EvaluationCache,
    SAEBenchEvaluator,
    UnlearningResult,
    build_cache,
    default_eval_config,
)
from raysae.unlearning.cache import as_tensor
from raysae.worlds import World
from raysae.worlds.model import load_model
from raysae.worlds.world import FORGET_SET, RETAIN_SETS

D_SAE = 256

GetSAE = Callable[[str, bool], SAE[Any]]
"""(architecture, trained) → SAE."""


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
        config = replace(self.config, **changes)
        cache = replace(self.cache, config=self.cache.config | changes)
        return CachedEvaluator(self.world, self.model, cache, config)

    def saebench(self, **changes: Any) -> SAEBenchEvaluator:
        config = replace(self.config, **changes)
        return SAEBenchEvaluator(self.world, self.model, self.hook_name, config, self.work_dir)

    def corpus_rows(self) -> Tensor:
        """float32 (tokens, d_model) of both corpora at the hook."""
        cache = self.cache
        return torch.cat(
            [as_tensor(c.resid[c.counts], cache.dtype, "cpu") for c in (cache.forget, cache.retain)]
        ).float()


def make_bench(
    world: World,
    work_dir: Path,
    hook_name: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
) -> Bench:
    """The model of `world` and its cache at a hook, by default the world's own."""
    world = replace(world, default_hook_name=hook_name or world.default_hook_name)
    model = load_model(world, device, dtype=getattr(torch, dtype))
    config = default_eval_config(world, llm_dtype=dtype)
    cache = build_cache(world, model, world.default_hook_name, config)
    return Bench(world, model, config, cache, work_dir)


def answer_logits(bench: Bench, evaluator: SAEBenchEvaluator, sae: SAE[Any]) -> tuple[Any, Tensor]:
    """SAEBench's result, and its logits of the four letters: (interventions, questions, 4)."""
    cfg, pad, found = bench.model.cfg, bench.model.tokenizer.pad_token_id, []

    def listen(_model: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        if output.shape[-1] == cfg.d_vocab:  # else the corpora, which stop at the hook
            last = (inputs[0] != pad).sum(dim=1).cpu() - 1
            found.append(output[torch.arange(len(last)), last][:, bench.cache.answer_tokens].cpu())

    evaluator.prepare()
    listening = bench.model.register_forward_hook(listen)
    result = evaluator.evaluate(sae, training_steps=1)
    listening.remove()
    logits = torch.cat(found).float()
    return result, logits.reshape(len(result.interventions), -1, 2, 4).amax(dim=2)


def changed_answers(result: UnlearningResult) -> float:
    """Share of the answers that an intervention turns from right to wrong or back."""
    turned = [right != result.baseline[name] for name, right in result.is_correct.items()]
    return float(np.concatenate(turned, axis=1).mean())


def assert_only_near_ties_differ(
    bench: Bench, sae: SAE[Any], *, near: float, ties: float, differing: float, **changes: Any
) -> None:
    """Features and sparsities are equal; an answer differs only where SAEBench's own is uncertain.

    Args:
        bench: both evaluators run on it.
        sae: an SAE for its hook.
        near: between SAEBench's two best letters, as a share of the power of two below the better.
        ties: at most this share of the answers is so near, or the test would say little.
        differing: at most this share of the answers differs.
        changes: of the configuration.
    """
    fast = bench.cached(**changes).evaluate(sae, training_steps=1)
    slow, logits = answer_logits(bench, bench.saebench(**changes), sae)
    right = bench.cache.is_right(logits.argmax(dim=-1).numpy())
    assert all(np.array_equal(right[name], slow.is_correct[name]) for name in right)

    assert np.array_equal(fast.forget_sparsity, slow.forget_sparsity)
    assert np.array_equal(fast.retain_sparsity, slow.retain_sparsity)
    assert [i.features for i in fast.interventions] == [i.features for i in slow.interventions]
    assert changed_answers(slow) > 0.02
    best, second = logits.topk(2, dim=-1).values.unbind(dim=-1)
    near_tie = (best - second <= near * torch.exp2(best.abs().log2().floor())).numpy()
    assert near_tie.mean() < ties
    differs = np.concatenate([fast.is_correct[n] != slow.is_correct[n] for n in right], axis=1)
    assert not (differs & ~near_tie).any()
    assert differs.mean() <= differing


def sae_maker(rows: Tensor, steps: int = 300) -> GetSAE:
    """Inference SAEs for these activations, untrained or trained by `steps`, once per kind."""
    weights: dict[tuple[bool, bool], dict[str, Tensor]] = {}
    batchtopk = functools.cache(functools.partial(batchtopk_sae, rows, steps=steps))

    def get(architecture: str, trained: bool) -> SAE[Any]:
        if architecture == "batchtopk":
            return deepcopy(batchtopk(trained=trained))
        key = (architecture == "topk", trained)
        if key not in weights:
            topk = 4 if key[0] else None
            with torch.enable_grad():
                weights[key] = (
                    train(rows, topk=topk, steps=steps) if trained else random_weights(rows)
                )
        return make_sae(architecture, weights[key])

    return get


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


def silent_sae(bench: Bench, sae: SAE[Any]) -> SAE[Any]:
    """A standard SAE with one feature, eligible on the corpora, that fires in no question."""
    cache = bench.cache
    forget = torch.from_numpy(cache.forget.resid[cache.forget.counts])
    others = torch.cat(
        [
            torch.from_numpy(cache.retain.resid[cache.retain.counts]),
            torch.from_numpy(cache.prompts.resid).flatten(0, 1),
        ]
    )
    unit = torch.nn.functional.normalize(forget, dim=1)[:2000]
    gap = (unit * forget[:2000]).sum(1) - (unit @ others.T).amax(1)
    row = int(gap.argmax())
    assert gap[row] > 0
    with torch.no_grad():
        sae.b_enc[:] = -1e6
        sae.b_dec[:] = 0
        sae.W_enc[:, 0] = unit[row]
        sae.b_enc[0] = -((unit[row] @ forget[row]) - gap[row] / 2)
    return sae


def random_weights(rows: Tensor, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(
        torch.randn(D_SAE, rows.shape[1], generator=generator), dim=1
    )
    # A negative bias makes the random features sparse enough for some to be eligible.
    b_enc = torch.full((D_SAE,), -2.5 * float(rows.std()))
    return {"W_enc": W_dec.T.clone(), "W_dec": W_dec, "b_enc": b_enc, "b_dec": rows.mean(0)}


def train(rows: Tensor, *, topk: int | None, steps: int) -> dict[str, Tensor]:
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


def batchtopk_sae(rows: Tensor, *, trained: bool, steps: int) -> SAE[Any]:
    """As SAELens saves a BatchTopK SAE: a JumpReLU SAE with the threshold found in training.

    Without training the steps look for the threshold only.
    """
    generator = torch.Generator().manual_seed(1)
    scale = float(rows.pow(2).mean().rsqrt())
    spec = SAESpec(architecture="batchtopk", d_sae=D_SAE, k=4)
    sae = make_training_sae(spec, rows.shape[1], seed=0, b_dec=scale * rows.mean(0))
    optimizer = torch.optim.Adam(sae.parameters(), lr=2e-3 if trained else 0.0)
    for step in range(steps):
        x = scale * rows[torch.randint(len(rows), (256,), generator=generator)]
        with torch.enable_grad():
            output = sae.training_forward_pass(
                TrainStepInput(
                    sae_in=x,
                    coefficients={},
                    dead_neuron_mask=None,
                    n_training_steps=step,
                    is_logging_step=False,
                )
            )
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    return export_sae(sae, scale)
