"""SAEs trained together are the SAEs that SAELens' own step trains alone."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from training_bench import PAIRS, doubled, every_architecture, small

from raysae import products
from raysae.training import pack as pack_module
from raysae.training.loop import stepper, train, train_one
from raysae.training.pack import Pack, can_pack
from raysae.training.precision import tf32
from raysae.training.run import Progress, Rung, SAERun, TrainingDivergedError
from raysae.training.schedules import Dynamic
from raysae.training.spec import TrialSpec
from raysae.training.stacked import PICKING


def alone(spec: TrialSpec, store: Any, steps: int) -> tuple[SAERun, list[dict[str, float]]]:
    run = doubled(SAERun(spec, store))
    return run, [{k: v.item() for k, v in run.advance().items()} for _ in range(steps)]


@pytest.mark.parametrize(("regularizer", "architecture"), PAIRS)
def test_every_member_gets_what_saelens_own_step_gives(
    regularizer, architecture, make_spec, make_store
):
    """Two seeds, the whole training; features die on the way."""
    spec = make_spec(
        architecture,
        regularizer,
        small(regularizer),
        steps=16,
        dead_after=3,
        sparsity=2 if "topk" in architecture else None,
    ).model_copy(update={"seeds": 2, "alpha_schedule": Dynamic(every=4)})
    store = make_store()
    pack = Pack([doubled(SAERun(member, store)) for member in spec.members()])
    packed = [pack.advance() for _ in range(16)]
    for i, member in enumerate(spec.members()):
        run, losses = alone(member, store, 16)
        for ours, expected in zip(packed, losses, strict=True):
            found = {name: value[i].item() for name, value in ours.items()}
            assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)
        state = pack.runs[i].sae.state_dict()
        for name, tensor in run.sae.state_dict().items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-6, atol=1e-9)
        for name, tensor in run.regularizer_state.items():
            found_state = pack.runs[i].regularizer_state[name]
            if name == "bases":  # the sign of a singular vector is a matter of rounding
                tensor, found_state = tensor.mT @ tensor, found_state.mT @ found_state
            torch.testing.assert_close(found_state, tensor, rtol=1e-6, atol=1e-9)
        for name, tensor in vars(run.firing).items():
            torch.testing.assert_close(vars(pack.runs[i].firing)[name], tensor)


@pytest.fixture(params=["mkl", "onednn"])
def library(request, monkeypatch):
    """Makes every product, however small."""
    if request.param == "onednn" and not products._has_onednn():
        pytest.skip("this PyTorch was built without oneDNN's linear layer")
    monkeypatch.setattr(products, "LEAST_WORK", 0)
    monkeypatch.setattr(products, "LEAST_ROWS", 1)
    with products.made_by(request.param):
        yield request.param


@pytest.mark.usefixtures("library")
@every_architecture
@pytest.mark.parametrize("regularizer", ["none", "fixed_orthogonal", "cross_task_inhibition"])
def test_an_sae_is_bit_for_bit_what_it_is_alone(regularizer, architecture, make_spec, make_store):
    """Or a last digit would decide between two features one day, and training go another way."""
    spec = make_spec(architecture, regularizer, small(regularizer), sparsity=3, dead_after=5)
    spec, store = spec.model_copy(update={"seeds": 3}), make_store()
    pack = Pack([SAERun(member, store) for member in spec.members()])
    singles = [Pack([SAERun(member, store)]) for member in spec.members()]
    for _ in range(24):
        together = pack.advance()["loss"]
        assert together.tolist() == [single.advance()["loss"].item() for single in singles]
    for run, single in zip(pack.runs, singles, strict=True):
        alone = single.runs[0].sae.state_dict()
        for name, tensor in run.sae.state_dict().items():
            assert torch.equal(tensor, alone[name]), name


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_members_keep_alpha_rates_sparsity_and_method_to_themselves(
    at_once, make_spec, make_store, monkeypatch
):
    """In one stack, and where their features are too large for one."""
    monkeypatch.setattr(pack_module, "_members_at_once", lambda _: at_once)
    specs = [
        make_spec("topk", "fixed_orthogonal", alpha=2.0, sparsity=3, lr=1e-3),
        make_spec("topk", "none", sparsity=5, lr=3e-3),
        make_spec(
            "topk",
            "task_masked",
            small("task_masked"),
            alpha=0.5,
            sparsity=4,
            schedule="linear_warmup",
        ),
    ]
    store = make_store()
    pack = Pack([doubled(SAERun(spec, store)) for spec in specs])
    packed = [pack.advance() for _ in range(24)]
    for i, spec in enumerate(specs):
        _, losses = alone(spec, store, 24)
        for ours, expected in zip(packed, losses, strict=True):
            assert ours["loss"][i].item() == pytest.approx(expected["loss"], rel=1e-6)
            assert ours["penalty"][i].item() == pytest.approx(expected.get("penalty", 0.0))


def test_what_fits_no_cache_together_is_not_stacked(make_spec, make_store, monkeypatch):
    store, spec = make_store(), make_spec()  # 64 rows of 32 features: 8 KiB an SAE
    for room, sizes in ((8 << 10, [1] * 5), (17 << 10, [1, 2, 2]), (1 << 20, [5])):
        monkeypatch.setattr(pack_module, "FEATURES_ON_CPU", room)
        members = spec.model_copy(update={"seeds": 5}).members()
        pack = Pack([SAERun(member, store) for member in members])
        assert [len(stack.runs) for stack in pack._stacks] == sizes


def test_the_seeds_of_a_trial_differ_in_weights_and_batches(make_spec, make_store):
    spec = make_spec().model_copy(update={"seeds": 3})
    runs = [SAERun(member, make_store()) for member in spec.members()]
    batches = [run.next_batch()[0] for run in runs]
    assert not torch.equal(batches[0], batches[1])
    assert not torch.equal(runs[0].sae.W_dec, runs[1].sae.W_dec)
    alone = SAERun(make_spec(), make_store())  # the first is the trial's own seed
    assert torch.equal(runs[0].sae.W_dec, alone.sae.W_dec)
    assert torch.equal(batches[0], alone.next_batch()[0])
    assert len({member.seed for member in spec.members()}) == 3


@every_architecture
def test_members_that_share_their_batches_are_those_that_gather_them_again(
    architecture, make_spec, make_store
):
    spec, store = make_spec(architecture, "task_masked", small("task_masked")), make_store()
    specs = [spec.model_copy(update={"seed": seed, "batch_seed": 9}) for seed in (1, 2)]
    pack = Pack([doubled(SAERun(spec, store)) for spec in specs])
    packed = [pack.advance()["loss"] for _ in range(12)]
    for i, spec in enumerate(specs):
        _, losses = alone(spec, store, 12)
        for ours, expected in zip(packed, losses, strict=True):
            assert ours[i].item() == pytest.approx(expected["loss"], rel=1e-6)


def test_a_trial_of_several_seeds_is_not_one_run(make_spec, make_store):
    with pytest.raises(ValueError, match="3 seeds"):
        SAERun(make_spec().model_copy(update={"seeds": 3}), make_store())


@pytest.mark.parametrize(
    "other",
    [{"architecture": "batchtopk"}, {"d_sae": 48}, {"batch_size": 32, "steps": 48}],
    ids=lambda other: next(iter(other)),
)
def test_what_differs_in_shape_or_position_is_not_packed(other, make_spec, make_store):
    store = make_store()
    runs = [SAERun(make_spec(), store), SAERun(make_spec(**other), store)]
    assert not can_pack(runs)
    with pytest.raises(ValueError, match="differ"):
        Pack(runs)


def test_who_is_stopped_leaves_and_the_others_go_on_as_if_alone(make_spec, make_store, fake_result):
    spec = make_spec("topk", "grouped", small("grouped"), rungs=(8 * 64, 24 * 64))
    spec, store = spec.model_copy(update={"seeds": 3}), make_store()
    runs = [SAERun(member, store) for member in spec.members()]
    told: list[int] = []

    def on_events(events: list[Progress | Rung]) -> list[bool]:
        told.append(len(events))
        at_rung = isinstance(events[0], Rung) and not events[0].last
        return [not (at_rung and i == 1) for i in range(len(events))]

    train(runs, lambda saes, _: [fake_result() for _ in saes], on_events)
    assert runs[1].step == 8
    assert set(told) == {2, 3}
    for i in (0, 2):
        whole = SAERun(spec.members()[i], store)
        train_one(whole, lambda *_: fake_result(), lambda _: True)
        assert runs[i].step == 24
        torch.testing.assert_close(runs[i].sae.W_dec, whole.sae.W_dec, rtol=1e-4, atol=1e-5)
        curves = [[row.metrics["loss"] for row in run.curve] for run in (runs[i], whole)]
        assert curves[0] == pytest.approx(curves[1], rel=1e-4)


@every_architecture
def test_a_member_that_diverges_leaves_with_its_last_good_weights(
    architecture, make_spec, make_store, fake_result
):
    """Those beside it end with the numbers that they have without it."""
    spec, store = make_spec(architecture).model_copy(update={"seeds": 3}), make_store()
    runs = [SAERun(member, store) for member in spec.members()]
    seen: list[list[Any]] = []

    def poison(events: Any) -> list[bool]:
        seen.append(events)
        if events[0].step == 5:
            with torch.no_grad():
                runs[1].sae.W_enc.fill_(float("nan"))
        return [True] * len(events)

    train(runs, lambda saes, _: [fake_result() for _ in saes], poison)
    (told,) = [
        events
        for events in seen
        if len(events) == 3 and isinstance(events[1], TrainingDivergedError)
    ]
    error = told[1]
    assert "loss is nan at step 6 of 24" in str(error)
    assert error.last_good_step == 5
    assert torch.isfinite(error.last_good.W_dec).all()
    assert [run.step for run in runs] == [24, 6, 24]
    pair = [SAERun(spec.members()[i], store) for i in (0, 2)]
    train(pair, lambda saes, _: [fake_result() for _ in saes], lambda events: [True] * len(events))
    for i, other in zip((0, 2), pair, strict=True):
        assert torch.equal(runs[i].sae.W_dec, other.sae.W_dec)
        curves = [[row.metrics["loss"] for row in run.curve] for run in (runs[i], other)]
        assert curves[0] == curves[1]


@every_architecture
@pytest.mark.parametrize("step", ["packed", "saelens"])
def test_in_bfloat16_weights_and_counts_stay_exact_and_losses_agree(
    step, architecture, make_spec, make_store
):
    """As on a GPU, but on this CPU: products lose digits, nothing else does."""
    store, losses = make_store(), {}
    for autocast in ("off", "bfloat16"):
        spec = make_spec(architecture, "task_masked", small("task_masked"), step=step,
                         autocast=autocast, dead_after=3)  # fmt: skip
        run = SAERun(spec, store)
        advance = stepper([run])
        losses[autocast] = torch.stack([advance()["loss"].detach() for _ in range(8)])
        assert {p.dtype for p in run.sae.parameters()} == {torch.float32}
        assert {p.grad.dtype for p in run.sae.parameters() if p.grad is not None} == {torch.float32}
        counts = torch.stack([run.firing.fired_forget, run.firing.fired_retain])
        assert torch.equal(counts, counts.round())
        assert run.firing.tokens_forget + run.firing.tokens_retain == 8 * 64
    torch.testing.assert_close(losses["bfloat16"], losses["off"], rtol=0.05, atol=0.0)
    assert not torch.equal(losses["bfloat16"], losses["off"])


def test_bfloat16_is_for_gpus_unless_it_is_asked_for(make_spec, make_store):
    store = make_store()
    wanted = {name: SAERun(make_spec(autocast=name), store) for name in ("auto", "off", "bfloat16")}
    assert {name: run.autocast for name, run in wanted.items()} == {
        "auto": False,
        "off": False,
        "bfloat16": True,
    }
    wanted["auto"].device = torch.device("cuda")
    assert wanted["auto"].autocast
    assert not can_pack([wanted["off"], wanted["bfloat16"]])


@pytest.mark.parametrize("step", ["packed", "saelens"])
@pytest.mark.parametrize("wanted", [True, False])
def test_a_step_multiplies_in_tf32_if_it_is_to_and_what_comes_after_does_not(
    wanted, step, make_spec, make_store
):
    spec = make_spec("standard", "fixed_orthogonal", step=step, tf32=wanted)
    run = SAERun(spec, make_store())
    seen: list[bool] = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(_: Any, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch.backends.cuda.matmul.allow_tf32)
            return x.view_as(x)

        @staticmethod
        def backward(_: Any, *grad: torch.Tensor) -> torch.Tensor:
            seen.append(torch.backends.cuda.matmul.allow_tf32)
            return grad[0]

    penalty = run.spec.regularizer.penalty
    looking = Mock(wraps=run.spec.regularizer, uses_alpha=True)
    looking.penalty = lambda view, state: Look.apply(penalty(view, state))
    run.spec = run.spec.model_copy(update={"regularizer": looking})
    with tf32(not wanted):
        stepper([run])()
        assert seen == [wanted, wanted]  # forward and backward
        assert torch.backends.cuda.matmul.allow_tf32 is not wanted
    assert not can_pack([run, SAERun(make_spec("standard", tf32=not wanted), make_store())])


def test_dead_features_are_looked_for_no_later_than_one_can_have_died(make_spec, make_store):
    """Every step has as many places as there are dead features."""
    run = SAERun(make_spec("topk", sparsity=1, dead_after=4, steps=24), make_store())
    pack = Pack([run])
    (stack,) = pack._stacks
    looks, dead = [], 0
    for _ in range(24):
        dead = int((run.firing.steps_since_fired > 4).sum())
        looks.append(stack._next_look[0] <= run.step)
        pack.advance()
        assert stack.places == (dead,)
    assert dead
    assert looks[:6] == [True, False, False, False, False, True]


@pytest.mark.parametrize("architecture", PICKING)
def test_places_left_over_change_nothing(architecture, make_spec, make_store):
    """As on a GPU, which is asked seldom how many features are dead."""
    spec = make_spec(architecture, sparsity=1, batch_size=8, dead_after=4, steps=40)
    spec, store = spec.model_copy(update={"seeds": 2}), make_store()
    pack = Pack([doubled(SAERun(member, store)) for member in spec.members()])
    (stack,) = pack._stacks
    stack._look_ahead = 7
    packed, left_over, looks = [], 0, 0
    for _ in range(40):
        dead = [int((run.firing.steps_since_fired > 4).sum()) for run in pack.runs]
        looks += stack._next_look[0] <= pack.runs[0].step
        packed.append(pack.advance())
        assert stack.places[0] == stack.places[1] >= max(dead)
        left_over += min(dead) > 0 and stack.places[0] > max(dead)
    assert left_over and looks <= 6
    for i, member in enumerate(spec.members()):
        _, losses = alone(member, store, 40)
        for ours, expected in zip(packed, losses, strict=True):
            found = {name: value[i].item() for name, value in ours.items()}
            assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert max(losses["auxiliary_reconstruction_loss"] for losses in losses) > 0
