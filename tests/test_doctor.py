"""Doctor: what is missing is said with what it is needed for, and nothing that is there is called
missing."""

from __future__ import annotations

import importlib.metadata
import json
import re
import tomllib
from pathlib import Path

import pytest

from benchsuite.measure import environment, torch_build
from benchsuite.plan import cell, plugins
from benchsuite.programs import doctor
from benchsuite.rules import Machine

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(
        doctor, "examine_torch", lambda: Machine("2.13.0+cpu", 0, gloo=True, nccl=False, mpi=False)
    )
    monkeypatch.setattr(doctor, "private_network", lambda: "unshare: not permitted")
    monkeypatch.setattr(environment, "gpus", tuple)


@pytest.fixture
def complete(quick, monkeypatch):
    """A machine with all that the suite uses, whatever this one has; without a GPU."""
    monkeypatch.setattr(doctor, "private_network", lambda: None)
    monkeypatch.setattr(doctor.load, "num_cores", lambda: 4)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0")


def rows() -> dict[str, dict[str, str]]:
    return {row["what"]: row for row in doctor.examine()["rows"]}


def test_every_row_says_what_for_and_missing_ones_the_remedy(quick):
    findings = doctor.examine()
    json.dumps(findings, allow_nan=False)
    found = {row["what"]: row for row in findings["rows"]}
    assert all(
        row["found"] and row["needed_for"] and row["ok"] == (not row["remedy"])
        for row in found.values()
    )
    assert found["gloo"]["ok"] and found["python"]["ok"]
    assert "unshare: not permitted" in found["private network"]["remedy"]
    assert {"cores", "TCP congestion control", "GPUs", "nccl", "mpi", "ip, tc", "git"} <= set(found)


def test_the_table_lists_what_is_missing_below(quick):
    text = doctor.table(doctor.examine())
    above, _, below = text.partition("missing:")
    assert "2.13.0+cpu" in above and "wire_bytes" in above
    assert (
        "private network, for wire_bytes, and ranks that nobody else can reach: unshare: not permitted"
        in below
    )
    assert "gloo" not in below


def test_of_a_complete_machine_nothing_is_missing(complete, monkeypatch):
    assert doctor.table(doctor.examine()).splitlines()[-1] == "nothing is missing"
    lacks_git = {"git": None}
    monkeypatch.setattr(doctor.shutil, "which", lambda name: lacks_git.get(name, name))
    assert (
        doctor.table(doctor.examine()).splitlines()[-1]
        == "  git, for the commit in every run: install git"
    )


def test_only_a_machine_with_a_gpu_misses_a_torch_that_can_use_it(quick, monkeypatch):
    assert rows()["GPUs"]["ok"] and rows()["nccl"]["ok"]
    monkeypatch.setattr(environment, "gpus", lambda: ("NVIDIA H200",))
    assert rows()["GPUs"]["found"] == "NVIDIA H200, unseen by torch"
    assert not rows()["GPUs"]["ok"] and not rows()["nccl"]["ok"]
    monkeypatch.setattr(
        doctor, "examine_torch", lambda: Machine("2.13.0", 8, gloo=True, nccl=True, mpi=False)
    )
    assert (
        rows()["GPUs"]["found"] == "8 NVIDIA H200" and rows()["GPUs"]["ok"] and rows()["nccl"]["ok"]
    )


def unused(row: dict[str, str]) -> list[str]:
    """What a row of the doctor is said to be needed for, and the suite does not have."""
    named = re.findall(r"\b(cluster|workload|backend|device) = (\w+)", row["needed_for"])
    known = {kind: plugins.names(kind) for kind in ("cluster", "workload")} | cell.CHOICES
    return [f"{kind} = {name}" for kind, name in named if name not in known[kind]]


def test_the_doctor_asks_only_for_what_the_suite_uses(quick):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    declared = {re.split(r"[^\w-]", requirement)[0] for requirement in wanted}
    asked = {name for name, _, _ in doctor.PACKAGES}
    assert asked <= declared and "pyarrow" not in declared, asked - declared
    assert [unused(row) for row in rows().values() if unused(row)] == []
    assert unused({"needed_for": "cluster = slurm, and backend = gloo"}) == ["cluster = slurm"]


def test_without_torch_there_is_one_row_that_says_so(quick, monkeypatch):
    monkeypatch.setattr(doctor, "examine_torch", lambda: Machine())
    assert "pip install torch" in rows()["torch"]["remedy"] and "gloo" not in rows()


@pytest.mark.procs
def test_the_probes_answer():
    torch = doctor.examine_torch()
    assert torch.torch and torch.gloo is not None and torch.num_cuda_devices is not None
    refused = doctor.private_network()
    assert refused is None or refused.strip()


def test_a_probe_that_fails_knows_nothing(monkeypatch):
    monkeypatch.setattr(torch_build, "_PROBE", "raise ImportError('no torch here')")
    assert doctor.examine_torch() == Machine()
    monkeypatch.setattr(doctor, "_PROBE_NETWORK", "raise SystemExit('not here')")
    assert doctor.private_network() == "not here"
