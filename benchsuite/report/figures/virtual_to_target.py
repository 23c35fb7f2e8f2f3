"""What the target takes in virtual time: the picture that `to_target` draws of the wall clock."""

from __future__ import annotations

from benchsuite.report.drawing.canvas import Drawing
from benchsuite.report.figures import to_target
from benchsuite.report.kinds import Kind
from benchsuite.report.material import Material
from benchsuite.report.spec import FigureSpec

KIND = Kind(
    title="What does the target take in virtual time?",
    clock="virtual",
    keys={
        "x": ("seconds", "samples", "bytes"),
        "goal": ("target", "easy", "hard"),
    },
    place=70,
)


def draw(spec: FigureSpec, material: Material) -> list[Drawing]:
    """One column per quantity, its seconds virtual; the colours tell who is slowed."""
    return to_target.draw(spec, material)
