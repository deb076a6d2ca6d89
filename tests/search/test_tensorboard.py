"""Event files: what TensorBoard would read, read back record by record."""

from __future__ import annotations

import struct
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from raysae.search.tensorboard import TensorBoardLog, hyperparameters, write_missing


def events(folder: Path) -> list[Event]:
    """The events of all files of a run: TFRecords, a length and a checksum before each."""
    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            body, (checksum,) = data[12 : 12 + length], struct.unpack_from("<I", data, 12 + length)
            crc = crc32c(body)
            assert checksum == ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
            found.append(Event.FromString(body))
            data = data[16 + length :]
    return found


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by tag, as they lie in the files."""
    found: dict[str, list[tuple[int, float]]] = {}
    for event in events(folder):
        for value in event.summary.value:
            if not value.metadata.plugin_data.plugin_name:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def sessions(folder: Path) -> list[HParamsPluginData]:
    values = [value for event in events(folder) for value in event.summary.value]
    plugins = [value.metadata.plugin_data for value in values]
    return [HParamsPluginData.FromString(p.content) for p in plugins if p.plugin_name == "hparams"]


def row(step: int) -> dict[str, Any]:
    return {"step": step, "tokens": 64 * step, "loss": 1 / step, "l0": 4.0}


def rung(step: int, score: float) -> dict[str, Any]:
    scores = {"score": score, "heldout_score": score / 2, "saebench_score": score / 4}
    scores["transferred_score"] = score / 8
    return {"event": "rung", "trial": 0, "step": step, **scores}


@pytest.fixture
def spec(make_spec) -> dict[str, Any]:
    grouped = {"group_update_period": 7, "n_groups": 3}
    made = make_spec("topk", "grouped", grouped, alpha=0.3, schedule="cosine").to_dict()
    assert isinstance(made, dict)
    return made


def end(spec: dict[str, Any], steps: int, score: float, **changes: Any) -> dict[str, Any]:
    curve = [row(step) for step in range(1, steps + 1)]
    record = {"event": "end", "trial": 0, "state": "finished", "spec": spec, "error": ""}
    record |= {"ended": time.time()}
    return record | {"rung": rung(steps, score), "curve": curve} | changes


def test_a_trial_is_a_run_with_curves_scores_and_hyperparameters(tmp_path: Path, spec):
    log = TensorBoardLog(tmp_path)
    log.curve(0, spec, [row(1), row(2)])
    log.rung(rung(2, 0.1))
    log.curve(0, spec, [row(3), row(4)])
    log.rung(rung(4, 0.4))
    log.end(end(spec, 4, 0.4))
    run = tmp_path / "tensorboard" / "0000"
    found = scalars(run)
    steps = [1, 2, 3, 4]
    assert found["train/loss"] == [(s, pytest.approx(1 / s)) for s in steps]
    assert found["train/tokens"] == [(s, 64.0 * s) for s in steps]
    assert found["score/search"] == [(2, pytest.approx(0.1)), (4, pytest.approx(0.4))]
    assert found["score/heldout"][-1] == (4, pytest.approx(0.2))
    assert found["score/transferred"][-1] == (4, pytest.approx(0.05))
    assert found["score/all_questions"][-1] == (4, pytest.approx(0.1))
    started, ended = sessions(run)
    values = started.session_start_info.hparams
    assert values["regularizer"].string_value == "grouped"
    assert values["regularizer.group_update_period"].number_value == 7
    assert values["alpha"].number_value == pytest.approx(0.3)
    assert values["alpha_schedule"].string_value == "cosine"
    assert values["sae.k"].number_value == 4
    assert ended.HasField("session_end_info")


def test_scores_on_questions_that_were_not_asked_are_left_out(tmp_path: Path, spec):
    unasked = dict.fromkeys(("heldout_score", "transferred_score", "saebench_score"))
    log = TensorBoardLog(tmp_path)
    log.curve(0, spec, [row(1), row(2)])
    log.rung(rung(2, 0.1) | unasked)
    log.rung(rung(4, 0.4))
    log.end(end(spec, 4, 0.4))
    log.end(end(spec, 2, 0.3, trial=1, state="stopped", rung=rung(2, 0.3) | unasked))
    found = scalars(tmp_path / "tensorboard" / "0000")
    assert found["score/search"] == [(2, pytest.approx(0.1)), (4, pytest.approx(0.4))]
    assert found["score/heldout"] == [(4, pytest.approx(0.2))]
    assert found["score/all_questions"] == [(4, pytest.approx(0.1))]
    stopped = scalars(tmp_path / "tensorboard" / "0001")
    assert stopped["score/search"] == [(2, pytest.approx(0.3))]
    assert not {"score/heldout", "score/transferred", "score/all_questions"} & stopped.keys()


def test_a_trial_of_an_older_version_is_written_with_the_scores_that_it_has(tmp_path: Path, spec):
    record = end(spec, 4, 0.4)
    del record["rung"]["transferred_score"]
    write_missing(tmp_path, [record])
    found = scalars(tmp_path / "tensorboard" / "0000")
    assert found["score/heldout"] == [(4, pytest.approx(0.2))]
    assert "score/transferred" not in found


def test_a_curve_can_be_read_while_the_trial_runs(tmp_path: Path, spec):
    log = TensorBoardLog(tmp_path)
    log.curve(0, spec, [row(1)])
    assert scalars(tmp_path / "tensorboard" / "0000")["train/loss"] == [(1, 1.0)]
    log.close()


def test_rows_that_come_again_are_written_once(tmp_path: Path, spec):
    """A trial whose worker died starts again, and reports the same numbers again."""
    log = TensorBoardLog(tmp_path)
    log.curve(0, spec, [row(1), row(2)])
    log.curve(0, spec, [row(1)])
    log.curve(0, spec, [row(1), row(2), row(3)])
    assert log.last_step == {0: 3}
    log.end(end(spec, 4, 0.4))
    steps = [step for step, _ in scalars(tmp_path / "tensorboard" / "0000")["train/loss"]]
    assert steps == [1, 2, 3, 4]


def test_a_trial_that_nobody_watched_is_written_at_its_end(tmp_path: Path, spec):
    log = TensorBoardLog(tmp_path)
    log.end(end(spec, 3, 0.4))
    found = scalars(tmp_path / "tensorboard" / "0000")
    assert [step for step, _ in found["train/loss"]] == [1, 2, 3]
    assert found["score/search"] == [(3, pytest.approx(0.4))]


def test_a_trial_that_failed_before_its_first_row_is_there_with_its_parameters(tmp_path, spec):
    log = TensorBoardLog(tmp_path)
    log.end(end(spec, 0, 0.0, rung={}, state="failed"))
    run = tmp_path / "tensorboard" / "0000"
    assert scalars(run) == {}
    assert len(sessions(run)) == 2


def test_a_search_started_again_keeps_what_ended_and_writes_the_rest_anew(tmp_path, spec):
    first = TensorBoardLog(tmp_path)
    record = end(spec, 3, 0.4)
    first.end(record)
    first.curve(1, spec | {"number": 1}, [row(1), row(2)])
    first.close()
    kept = {path.name for path in (tmp_path / "tensorboard" / "0000").iterdir()}

    again = TensorBoardLog(tmp_path)
    again.end(record)  # from the journal
    again.curve(1, spec | {"number": 1}, [row(1), row(2), row(3)])
    again.close()
    assert {path.name for path in (tmp_path / "tensorboard" / "0000").iterdir()} == kept
    curve = scalars(tmp_path / "tensorboard" / "0001")["train/loss"]
    assert [step for step, _ in curve] == [1, 2, 3]


def test_a_trial_that_ended_after_the_last_look_is_completed(tmp_path, spec):
    log = TensorBoardLog(tmp_path)
    log.curve(0, spec, [row(1)])
    log.close()
    run = tmp_path / "tensorboard" / "0000"
    later = end(spec, 3, 0.4, ended=time.time() + 10)
    write_missing(tmp_path, [later, end(spec | {"number": 1}, 2, 0.2, trial=1)])
    assert [step for step, _ in scalars(run)["train/loss"]] == [1, 2, 3]
    assert scalars(run)["score/search"] == [(3, pytest.approx(0.4))]
    assert len(sessions(run)) == 2
    assert len(scalars(run.with_name("0001"))["train/loss"]) == 2


def test_hyperparameters_are_flat_and_leave_out_what_is_not_set(make_spec):
    flat = hyperparameters(make_spec("standard").to_dict())
    assert flat["sae.l1_coefficient"] == 0.5
    assert "sae.k" not in flat
    assert flat["rungs"] == "[1536]"
    assert all(isinstance(value, bool | int | float | str) for value in flat.values())
