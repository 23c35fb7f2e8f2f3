"""Doctor: what is missing is said with what it is needed for, and nothing that is there is called
missing."""

from __future__ import annotations

import json

import pytest

from benchsuite.programs import doctor
from benchsuite.rules import Machine


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(
        doctor, "examine_torch", lambda: Machine("2.13.0+cpu", 0, gloo=True, nccl=False, mpi=False)
    )
    monkeypatch.setattr(doctor, "private_network", lambda: "unshare: not permitted")


def test_every_row_says_what_for_and_missing_ones_the_remedy(quick):
    findings = doctor.examine()
    json.dumps(findings, allow_nan=False)
    rows = {row["what"]: row for row in findings["rows"]}
    assert all(
        row["found"] and row["needed_for"] and row["ok"] == (not row["remedy"])
        for row in rows.values()
    )
    assert rows["gloo"]["ok"] and rows["python"]["ok"]
    assert not rows["nccl"]["ok"] and not rows["mpi"]["ok"] and not rows["GPUs"]["ok"]
    assert "unshare: not permitted" in rows["private network"]["remedy"]
    assert {"cores", "slurm", "TCP congestion control", "mpirun"} <= set(rows)


def test_the_table_lists_what_is_missing_below(quick):
    text = doctor.table(doctor.examine())
    above, _, below = text.partition("missing:")
    assert "2.13.0+cpu" in above and "wire_bytes" in above
    assert "mpi, for backend = mpi: build torch from source" in below
    assert "gloo" not in below


def test_without_torch_there_is_one_row_that_says_so(quick, monkeypatch):
    monkeypatch.setattr(doctor, "examine_torch", lambda: Machine())
    rows = {row["what"]: row for row in doctor.examine()["rows"]}
    assert "pip install torch" in rows["torch"]["remedy"] and "gloo" not in rows


@pytest.mark.procs
def test_the_probes_answer():
    torch = doctor.examine_torch()
    assert torch.torch and torch.gloo is not None and torch.num_cuda_devices is not None
    refused = doctor.private_network()
    assert refused is None or refused.strip()


def test_a_probe_that_fails_knows_nothing(monkeypatch):
    monkeypatch.setattr(doctor, "_PROBE_TORCH", "raise ImportError('no torch here')")
    assert doctor.examine_torch() == Machine()
    monkeypatch.setattr(doctor, "_PROBE_NETWORK", "raise SystemExit('not here')")
    assert doctor.private_network() == "not here"
