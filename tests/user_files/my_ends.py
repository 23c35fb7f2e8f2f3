"""Final metric of every run, a dot each."""

from benchsuite.report.drawing.canvas import Drawing, grid
from benchsuite.report.kinds import Kind

KIND = Kind(title="How does every run end?", clock="wall", keys={"order": ("seed", "value")})


def draw(spec, material):
    wanted = set(material.wanted(spec))
    ends = [run.result["final_metric"] for run in material.runs if run.cell_id in wanted]
    if spec.values["order"] == ("value",):
        ends.sort()
    layout = grid([1.0], 1, width=3.0, legend=[])
    layout.axes[0][0].plot(range(len(ends)), ends, "o", gid="my dots")
    ids = sorted(wanted)
    caption = f"{len(ends)} runs. {material.provenance(ids)}"
    return [Drawing(spec.name, layout.figure, caption, ids, [], layout.whole)]
