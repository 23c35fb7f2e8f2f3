"""A law that holds for something broken is worth nothing: each one must catch each of its broken
twins."""

from __future__ import annotations

import pytest

from benchsuite.laws import Control, Figure, Law
from benchsuite.laws.harness.cases import in_processes
from benchsuite.laws.harness.ranks import thread_ranks
from tests.law_cells import all_laws, on, tiny

LAWS = [(family, law) for family, laws in all_laws().items() for law in laws]
FAR = 1e-3  # where a law has a bound for roundings, a defect must lie far above it


@pytest.mark.parametrize("law", [pytest.param(law, id=law.name) for _, law in LAWS])
def test_every_law_has_a_broken_twin(law: Law) -> None:
    assert law.controls


@pytest.mark.parametrize(
    ("law", "control"),
    [
        pytest.param(law, control, id=f"{law.name}: {control.broken}")
        for _, law in LAWS
        for control in law.controls
        if not in_processes(on(tiny(), **control.on))  # tests/test_laws_processes.py
    ],
)
def test_the_law_catches(law: Law, control: Control) -> None:
    figure = control.check(thread_ranks, on(tiny(), **control.on))
    assert not figure.holds, f"{law.name} does not see that {control.broken}: {figure}"
    assert figure.value != figure.value or figure.value > FAR, (
        f"{law.name} hardly sees that {control.broken}: {figure}"
    )


def test_a_figure_says_both_numbers_and_a_nan_never_holds() -> None:
    assert str(Figure(2e-16, 1e-10, "step 3")) == "2e-16 <= 1e-10: step 3"
    assert str(Figure(0.5, 1e-10)) == "0.5 is not <= 1e-10"
    assert not Figure(float("nan"), 1.0).holds
