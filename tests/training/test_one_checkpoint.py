"""Two processes that share a trial take it up at one place, whatever each finds on its disk."""

from __future__ import annotations

import copy
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from raysae.store.batches import ChunkedActivations
from raysae.training.checkpoint import CHECKPOINT_FILE, Checkpoints
from raysae.training.collective import Group
from raysae.training.run import SAERun
from raysae.training.spec import TrialSpec

FOUND: dict[str, tuple[str, str]] = {
    "nothing": ("", ""),
    "the same": ("step 7", "step 7"),
    "the first alone": ("step 7", ""),
    "the second alone": ("", "step 7"),
    "an older one": ("step 7", "step 4"),
    "a newer one": ("step 4", "step 7"),
    "another of that step": ("step 7", "step 7 again"),
    "a damaged one": ("step 7", "damaged"),
}
"""By case, what each process finds."""


def one_of_two(rank: int, folder: Path, spec: TrialSpec, store: ChunkedActivations) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    group = Group(dist.new_group([0, 1]))
    states = {}
    for case in FOUND:
        run = SAERun(spec, store, collective=group)
        found = Checkpoints(folder / case / f"{rank}").restore([run])
        state = copy.deepcopy(run.state_dict())
        run.advance()  # they would hang, or learn what neither has, if they were not at one place
        states[case] = found, state, run.sae.W_dec.detach().clone()
    torch.save(states, folder / f"{rank}")
    dist.destroy_process_group()


@pytest.fixture
def taken_up(tmp_path: Path, make_spec, make_store):
    """By file or by case: the state of one process alone, and whether each of two found a
    checkpoint, its state, and the weights that it learns next."""
    spec, store = make_spec(step="saelens"), make_store()
    files: dict[str, bytes] = {}
    for name, steps in (("step 4", 4), ("step 7", 7), ("step 7 again", 7)):
        run = SAERun(spec, store)
        for _ in range(steps):
            run.advance()
        if name == "step 7 again":  # as if a worker had gone on otherwise
            with torch.no_grad():
                run.sae.W_dec.mul_(1.5)
        Checkpoints(tmp_path).save([run])
        files[name] = (tmp_path / CHECKPOINT_FILE).read_bytes()
    files["damaged"] = files["step 7"][:-1000]
    for case, found in FOUND.items():
        for rank, name in enumerate(found):
            folder = tmp_path / case / f"{rank}"
            folder.mkdir(parents=True)
            if name:
                (folder / CHECKPOINT_FILE).write_bytes(files[name])
    forkserver.set_forkserver_preload(["raysae.training.loop"])
    mp.start_processes(one_of_two, (tmp_path, spec, store), nprocs=2, start_method="forkserver")
    alone = {"": SAERun(spec, store).state_dict()}
    for name in ("step 4", "step 7"):
        (tmp_path / CHECKPOINT_FILE).write_bytes(files[name])
        run = SAERun(spec, store)
        Checkpoints(tmp_path).restore([run])
        alone[name] = run.state_dict()
    return alone, *(torch.load(tmp_path / f"{rank}", weights_only=False) for rank in range(2))


def test_both_are_where_the_first_one_is(taken_up):
    alone, first, second = taken_up
    for case, (name, _) in FOUND.items():
        for found, state, _ in (first[case], second[case]):
            assert found == bool(name), case
            assert state["step"] == int(name.removeprefix("step ") or 0), case
            for key, tensor in alone[name]["sae"].items():
                assert torch.equal(state["sae"][key], tensor), (case, key)
            moments = alone[name]["optimizer"]["state"]
            assert state["optimizer"]["state"].keys() == moments.keys(), case
            for key, kept in moments.items():
                assert torch.equal(state["optimizer"]["state"][key]["exp_avg"], kept["exp_avg"])
        assert torch.equal(first[case][2], second[case][2]), case
