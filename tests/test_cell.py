"""A cell's id: equal for equal meaning, different for anything that may change a number."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchsuite.errors import UsageError
from benchsuite.plan import cell as cells
from benchsuite.plan.cell import Budget, Cell, from_json, resolve
from benchsuite.plan.hashing import canonical

ASYNC = {"sync": "asynchronous", "topology": "parameter_server", "replicas": 2}


def test_an_omitted_default_equals_the_written_one():
    plain = resolve(Cell(**ASYNC))
    written = Cell(
        **ASYNC,
        servers=1,
        preset="digits",
        budget=Budget(samples=15360),
        options={"asynchronous": {"lock": "exclusive"}, "cnn": {"lr": 0.03, "momentum": 0.9}},
    )
    assert resolve(written).id == plain.id
    assert resolve(dataclasses.replace(plain)).id == plain.id, "resolving twice changes nothing"


def test_steps_equal_the_samples_they_mean():
    assert resolve(Cell(budget=Budget(steps=10))).id == resolve(Cell(budget=Budget(samples=640))).id
    weak = resolve(Cell(budget=Budget(steps=10), replicas=4, batch_mode="fixed_per_worker"))
    assert weak.budget.samples == 2560 and cells.global_batch(weak) == 256


def test_key_order_and_number_type_do_not_matter():
    a = resolve(
        Cell(replicas=2, straggler={"1": 4, "0": 2.0}, options={"cnn": {"lr": 1, "momentum": 0.5}})
    )
    b = resolve(
        Cell(
            replicas=2, straggler={"0": 2, "1": 4.0}, options={"cnn": {"momentum": 0.5, "lr": 1.0}}
        )
    )
    assert a.id == b.id
    assert canonical({"b": 4.0, "a": [1]}) == canonical({"a": (1,), "b": 4}) == '{"a":[1],"b":4}'


def test_the_seed_is_not_in_the_id_and_everything_else_is():
    base = resolve(Cell(**ASYNC))
    assert base.with_seed(7).id == base.id and base.with_seed(7) != base
    changes = {
        "precision": "fp64",
        "replicas": 4,
        "threads": 2,
        "server_placement": "with_worker",
        "hosts": 2,
        "link_mbit": 100.0,
        "straggler": {"0": 4.0},
        "batch_mode": "fixed_per_worker",
        "cluster": "torchrun",
        "tuning": "per_strategy",
        "servers": 2,
        "backend": "nccl",
        "device": "cuda",
        "clock": "virtual",
        "preset": "smoke",
        "options": {"asynchronous": {"lock": "none"}},
        "budget": Budget(timeout_s=30),
        "compute_time": {"kind": "gamma"},
        "rank_placement": "part_major",
        "link_latency_us": 1.0,
        "faults": ({"rank": 0, "phase": "compute"},),
        "lr_factor": 2.0,
    }
    ids = {name: resolve(Cell(**{**ASYNC, name: value})).id for name, value in changes.items()}
    assert len({base.id, *ids.values()}) == 1 + len(changes), ids


def test_json_round_trip_gives_an_equal_cell():
    cell = resolve(
        Cell(
            **ASYNC,
            straggler={"0": 4.0},
            faults=({"rank": 0, "phase": "compute", "step": 3},),
            seed=2,
        )
    )
    again = from_json(json.loads(json.dumps(cell.to_json())))
    assert again.id == cell.id and again == cell
    with pytest.raises(UsageError, match="unknown fields .*'colour'"):
        from_json(cell.to_json() | {"colour": "red"})


def _net(path: Path, lr: str = "0.1") -> str:
    path.write_text(
        "presets = {'default': {'global_batch': 8, 'budget_samples': 80, 'num_layers': 2}}\n\n\n"
        f"class Workload:\n    lr: float = {lr}\n"
    )
    return str(path)


def test_a_path_plugin_is_known_by_name_and_content(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    first = resolve(Cell(workload=_net(tmp_path / "my_net.py")))
    copied = resolve(Cell(workload=_net(tmp_path / "elsewhere" / "my_net.py")))
    assert first.id == copied.id, "where the file lies does not matter"
    assert resolve(Cell(workload=_net(tmp_path / "other.py"))).id != first.id
    assert first.label.startswith("my_net/default")


def test_editing_a_path_plugin_changes_the_id(tmp_path):
    path = tmp_path / "my_net.py"
    before = resolve(Cell(workload=_net(path)))
    path.write_text(path.read_text() + "# a comment is an edit too\n")
    os.utime(path, ns=(1, 1))  # a coarse clock must not hide the edit
    assert resolve(Cell(workload=str(path))).id != before.id


def test_an_option_that_came_later_leaves_ids_alone_at_its_default():
    """Stored runs keep their ids; another value is another cell."""
    plain = resolve(Cell())
    written = resolve(Cell(options={"data": {"num_micro_batches": 1}}))
    assert "data" not in plain.options and plain == written
    assert resolve(Cell(options={"data": {"num_micro_batches": 2}})).id != plain.id


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"workload": "cmn"}, "unknown workload 'cmn'; did you mean 'cnn'? known: cnn, "),
        (
            {"preset": "digit"},
            "unknown preset 'digit' of cnn; did you mean 'digits'? known: digits, ",
        ),
        (
            {"sync": "asynchronus"},
            "did you mean 'asynchronous'? known: asynchronous, synchronous, ",
        ),
        (
            {"options": {"cnn": {"lrr": 1.0}}},
            "unknown option 'lrr' of cnn; did you mean 'lr'? known: lr, ",
        ),
        ({"options": {"cnn": {"lr": "fast"}}}, "option 'lr' of cnn takes float, not 'fast'"),
        (
            {"options": {"ring": {"segment_kib": 1}}},
            "options given for 'ring', which this cell does not use",
        ),
        ({"clock": "wal"}, "unknown clock 'wal'; did you mean 'wall'? known: wall, virtual"),
        ({"budget": Budget(samples=64, steps=1)}, "samples = 64 and steps = 1: give one of them"),
        ({"workload": "nowhere/my_net.py"}, "no such file"),
    ],
)
def test_unknown_names_get_the_known_ones_nearest_first(fields, message):
    with pytest.raises(UsageError) as caught:
        resolve(Cell(**fields))
    assert message in str(caught.value)


def test_a_workload_without_presets_says_what_to_write(tmp_path):
    path = tmp_path / "bare.py"
    path.write_text("class Workload:\n    pass\n")
    with pytest.raises(UsageError, match="presets = "):
        resolve(Cell(workload=str(path)))


def test_cells_plans_rules_and_doctor_import_no_torch():
    modules = [f"measure.{name}" for name in ("environment", "load", "wire", "memory")]
    modules += ["plan.cell", "plan.plan", "rules", "rules.plans", "programs.doctor"]
    modules += ["results.code_id"]
    code = (
        ";".join(f"import benchsuite.{name}" for name in modules)
        + ";from benchsuite import rules;rules.validate(benchsuite.plan.cell.Cell())"
        + ";import sys;print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
