"""What this machine could measure beside what the virtual clock says.

The two panels have two axes and two kinds of seconds, which are not compared.
"""

from __future__ import annotations

from benchsuite.report import text
from benchsuite.report.drawing.canvas import Drawing, grid
from benchsuite.report.drawing.style import WIDE_IN
from benchsuite.report.drawing.worker_lines import (
    cells_of,
    draw_line,
    said_of_worlds,
    share_limits,
    style_axes,
)
from benchsuite.report.kinds import Kind
from benchsuite.report.material import Material
from benchsuite.report.spec import FigureSpec

KIND = Kind(
    title="What this machine could measure, and what the virtual clock says",
    clock="both",
    place=110,
)


def draw(spec: FigureSpec, material: Material) -> list[Drawing]:
    """Left what was measured here, right what the virtual clock says of the same plan."""
    measured = material.of(material.scaling, spec)
    virtual = cells_of(spec, material)
    virtual = virtual[virtual["virtual_samples_per_s"].map(lambda s: s.n) > 0]
    if virtual.empty:
        return []
    series = list(dict.fromkeys([*measured["series"], *virtual["series"]]))
    legend = [material.looks[name] for name in series]
    layout = grid([1.9], 2, width=WIDE_IN, legend=legend)
    left, right = layout.axes[0]
    whole = measured[~measured["oversubscribed"].astype(bool)]
    counts = sorted({*whole["replicas"], *virtual["replicas"]})

    for position, name in enumerate(series):
        shift = 2 ** (0.09 * (position - (len(series) - 1) / 2))
        for ax, table, column in (
            (left, whole, "samples_per_s"),
            (right, virtual, "virtual_samples_per_s"),
        ):
            points = table[table["series"] == name].sort_values("replicas")
            if len(points):
                draw_line(ax, points, column, material.looks[name], shift)

    for ax, title in (
        (left, "measured here: samples per second"),
        (right, "virtual: samples per virtual second"),
    ):
        style_axes(ax, "samples_per_s", counts, first=False, last=True)
        share_limits([ax], "samples_per_s")
        ax.set_title(title, loc="left")

    left_out = int(measured["oversubscribed"].sum())
    caption = (
        "Left: total samples over total wall time, where workers and servers have a core each"
        + (
            f" ({text.count_of(left_out, 'cell')} with more ranks than cores left out)"
            if left_out
            else ""
        )
        + f". {material.provenance(list(whole['cell_id']))} Right: the same strategy files on a "
        "simulated clock and "
        f"network, {said_of_worlds(virtual)}; "
        f"{material.in_virtual_time.provenance(list(virtual['cell_id']))} The two kinds of "
        "seconds are not compared: the virtual machine has a core and a port for every rank."
    )
    ids = [*whole["cell_id"], *virtual["cell_id"]]
    return [
        Drawing(
            spec.name,
            layout.figure,
            caption,
            ids,
            legend,
            layout.whole,
            layout.columns,
            alt="samples per second against workers: measured on this machine, and in virtual time",
        )
    ]
