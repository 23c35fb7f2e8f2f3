"""The page of a plan, made from its stored runs; no cell is ever run here.

`index.html` is one file: figures are inlined SVG, styles and the few lines of script stand in it,
and nothing is fetched. Figures and tables lie beside it as files, with a manifest of checksums.
Rendered twice from the same runs it is the same, byte for byte: the only date in it is that of the
newest run (or SOURCE_DATE_EPOCH).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import pandas as pd
from markupsafe import Markup

from benchsuite.analysis.arrival import base
from benchsuite.analysis.parallel import is_divided
from benchsuite.analysis.select import Selection, select
from benchsuite.plan.cell import Cell
from benchsuite.plan.plan import Plan
from benchsuite.report import kinds, manifest, printed, spec, text
from benchsuite.report.drawing import canvas, legend, style
from benchsuite.report.drawing.canvas import Drawing
from benchsuite.report.drawing.style import WIDE_IN
from benchsuite.report.material import Material
from benchsuite.report.tables import parallel_table
from benchsuite.report.words import limits
from benchsuite.report.words.answer import answer
from benchsuite.report.words.sentences import listed
from benchsuite.results.record import Run
from benchsuite.results.store import Store

TEMPLATES = Path(__file__).resolve().parent / "templates"
WIDEST_PX = 952  # of a picture on a page, where one of WIDE_IN has its natural size: style.css


@dataclass
class Section:
    """One `[[figures]]` entry on the page."""

    id: str
    title: str
    drawings: list[dict[str, Any]] = field(default_factory=list)
    table: printed.Table | None = None
    nothing: str = "No ok run to draw."


def render_stored(
    plan: Plan,
    store: Store,
    out_dir: Path,
    *,
    code_id: Callable[[Cell], str] | None = None,
    machine: str | None = None,
) -> Path:
    """Renders the runs of a results folder.

    `code_id`: cell -> the id of its current code; a run of other code is stale.
    """
    runs = store.runs(plan.cells, seeds=plan.seeds)
    used = {(run.machine, run.environment_id) for run in runs}
    environments = {identity: store.environment(where, identity) for where, identity in used}
    code_ids = {cell.id: code_id(cell) for cell in plan.cells} if code_id else None
    return render(
        plan, runs, out_dir, environments=environments, code_ids=code_ids, machine=machine
    )


def render(
    plan: Plan,
    runs: Iterable[Run],
    out_dir: Path,
    *,
    environments: Mapping[str, Mapping[str, Any]] | None = None,
    code_ids: Mapping[str, str] | None = None,
    machine: str | None = None,
) -> Path:
    """Writes the page of `plan` under `out_dir` and returns the path of index.html.

    `environments`: environment id -> stored environment. `code_ids`: cell id -> current code id
    (default: that of its newest run). `machine`: default that of the newest run. UsageError for a
    figure entry that is not one.
    """
    specs = spec.parse(plan.figures, plan.cells)
    selection = select(plan.cells, plan.seeds, runs, code_ids=code_ids, machine=machine)
    by_age = sorted(selection.runs, key=lambda run: run.started_at)
    known = environments or {}
    ids = dict.fromkeys(run.environment_id for run in by_age)
    material = Material(
        plan.cells,
        plan.seeds,
        selection,
        [known.get(each, {}) for each in ids],
        refused=plan.refused,
    )
    epoch = _epoch(by_age)
    manifest.clear(out_dir)
    for folder in ("figures", "tables"):
        (out_dir / folder).mkdir(parents=True, exist_ok=True)
    sections = _sections(specs, material, out_dir, epoch=epoch)
    page = _html(
        plan,
        material,
        sections,
        drawn={clock for entry in specs for clock in kinds.find(entry.kind).kind.clocks},
    )
    path = out_dir / "index.html"
    path.write_text(page, encoding="utf-8")
    manifest.write(plan, selection, known, out_dir, epoch=epoch)
    return path


def _epoch(runs: Sequence[Run]) -> int:
    """The seconds since 1970 that files may carry.

    SOURCE_DATE_EPOCH, else the start of the newest run, else 0.
    """
    given = os.environ.get("SOURCE_DATE_EPOCH", "")
    if given.isdecimal():
        return int(given)
    stamps = [datetime.fromisoformat(run.started_at) for run in runs if run.started_at]
    return int(max(stamps).replace(tzinfo=UTC).timestamp()) if stamps else 0


def _sections(
    specs: Sequence[spec.FigureSpec], material: Material, out_dir: Path, *, epoch: int
) -> list[Section]:
    sections = []
    number = 0

    with matplotlib.rc_context(style.theme()):  # type: ignore[arg-type]  # a Literal of all keys, which a dict[str] is not
        for entry in specs:
            section = Section(entry.name, entry.title)

            if not material.has_cells(entry):
                section.nothing = "No cell of this plan belongs here."
            elif kinds.find(entry.kind).is_table:
                section.table = kinds.load(entry.kind)(entry, material.seen_by(entry))
                printed.save(section.table, out_dir / "tables")
            elif material.selection.runs:
                for drawing in kinds.load(entry.kind)(entry, material.seen_by(entry)):
                    number += 1
                    section.drawings.append(_placed(drawing, out_dir, number=number, epoch=epoch))

            sections.append(section)

    return sections


def _placed(drawing: Drawing, out_dir: Path, *, number: int, epoch: int) -> dict[str, Any]:
    """Saves a drawing and returns what the template needs of it."""
    svg = canvas.save(drawing, out_dir / "figures", epoch=epoch)
    shown = drawing.legend if len(drawing.legend) > 1 else ()
    return {
        "id": f"f{number}",
        "name": drawing.name,
        "svg": Markup(
            canvas.inline(svg, f"f{number}-")
        ),  # our own matplotlib output, text in it is escaped
        "whole": _view(drawing.whole),
        "width": round(
            drawing.whole[2] * WIDEST_PX / (72 * WIDE_IN)
        ),  # a narrow drawing's letters stay as they are
        "panels": [_panel(box, drawing.labels) for box in drawing.panels],
        "alt": drawing.alt,
        "caption": f"Figure {number}. {drawing.caption}",
        "legend": [legend.entry(each) for each in shown],
    }


def _panel(box: canvas.Box, labels: canvas.Box | None) -> dict[str, Any]:
    """One panel for a phone.

    The names of its rows stand in the whole picture once; here they are cut out beside the panel.
    """
    if labels is None:
        return {"parts": [{"view": _view(box), "share": 1}], "width": _phone_width(box)}
    parts = [{"view": _view(part), "share": part[2]} for part in (labels, box)]
    return {"parts": parts, "width": round((labels[2] + box[2]) * 1.55)}


def _view(box: canvas.Box) -> str:
    return " ".join(f"{value:g}" for value in box)


def _phone_width(box: canvas.Box) -> int:
    """CSS pixels of a panel on a phone: two narrow ones side by side, else one.

    The factors keep its text at about 10 px or more.
    """
    width = box[2]
    return round(width * (1.34 if width <= 130 else 1.95))


def _html(
    plan: Plan, material: Material, sections: Sequence[Section], *, drawn: Collection[str]
) -> str:
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    selection = material.selection
    absent = [
        {
            "cell": _named(absence.cell),
            "seed": str(absence.seed),
            "status": absence.status,
            "reason": absence.reason,
        }
        for absence in selection.absent
    ]

    for refused in plan.refused:
        absent.append(
            {
                "cell": _named(refused.cell),
                "seed": "all",
                "status": "unsupported",
                "reason": refused.reason,
            }
        )

    stale = [
        f"{run.cell.label} seed {run.cell.seed}: {run.run_id}, code {run.code_id}"
        for run in selection.stale
    ]
    page: str = environment.get_template("page.html").render(
        name=plan.name,
        question=plan.question or f"Plan {plan.name}",
        lede=_lede(plan, material),
        preview=0 < len(plan.seeds) < 5,
        answer=answer(material),
        facts=_facts(material),
        sections=sections,
        limits=limits.limits(material),
        definitions=limits.DEFINITIONS,
        tally=_tally(plan, selection),
        absent=absent,
        asides=_asides(material, drawn=drawn),
        stale=stale,
        footer=_footer(material),
        css=Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),
        script=Markup((TEMPLATES / "sort.js").read_text(encoding="utf-8")),
    )
    return page


def _named(cell: Cell) -> str:
    """A cell's name in the list of absent runs; a divided replica's has its schedule."""
    if not is_divided(cell):
        return cell.label
    workload = cell.label.partition(" ")[0]
    return f"{workload} on {cell.num_workers} ranks: {parallel_table.label(cell)}"


def _lede(plan: Plan, material: Material) -> str:
    names = material.names
    virtual = material.in_virtual_time.names
    if names.empty and virtual.empty:
        return "This plan has no cell that can run."
    seeds = text.count_of(len(plan.seeds), "seed")
    said = [f"{_trained(names)}, {seeds}." if len(names) else ""]

    if len(virtual):
        said.append(
            f"In virtual time (real gradients, simulated clock and network): {_trained(virtual)}, "
            f"{seeds}."
        )

    return " ".join([*filter(None, said), "Same initial parameters, same data, same schedule."])


def _trained(names: pd.DataFrame) -> str:
    """What was trained: `cnn/digits under 5 strategies by 1, 2, 4 workers, 15,360 samples each`."""
    ranks = names["world_size"] - names["servers"]
    who = "by {} workers" if ranks.equals(names["replicas"]) else "on {} ranks"
    counts = [str(count) for count in sorted(set(ranks))]
    shown = ", ".join(counts) if len(counts) <= 6 else f"{counts[0]} to {counts[-1]}"
    budgets = sorted({budget for budget in names["budget_samples"] if budget})
    budget = f", {budgets[0]:,} samples each" if len(budgets) == 1 else ""
    series = {
        base(str(one), str(tuning))
        for one, tuning in zip(names["series"], names["tuning"], strict=True)
    }
    who = (who.removesuffix("s") if counts == ["1"] else who).format(shown)
    strategies = text.count_of(len(series), "strategy").replace("strategys", "strategies")
    return f"{listed(list(dict.fromkeys(names['workload'])))} under {strategies} {who}{budget}"


def _facts(material: Material) -> list[tuple[str, str]]:
    """What stands under the answer: where and when the runs were made."""
    runs = material.selection.runs
    if not runs:
        return []
    dates = sorted(run.started_at for run in runs)
    span = (
        dates[0][:10] if dates[0][:10] == dates[-1][:10] else f"{dates[0][:10]} to {dates[-1][:10]}"
    )
    virtual = sum(run.cell.clock == "virtual" for run in runs)
    cores = sorted({str(run.cost["cores"]) for run in runs if run.cost.get("cores")})
    facts = [
        ("machine", material.selection.machine),
        ("cores", ", ".join(cores)),
        ("runs", f"{len(runs)} ok" + (f", {virtual} virtual" if virtual else "")),
        ("made", span),
    ]
    facts.append(("commit", ", ".join(material.commits)))

    for key in ("cpu", "torch", "python"):
        values = {
            str(e.get(key) or e.get("versions", {}).get(key) or "") for e in material.environments
        } - {""}
        if values:
            facts.append((key, ", ".join(sorted(values))))

    return [(key, value) for key, value in facts if value]


def _tally(plan: Plan, selection: Selection) -> str:
    """How many (cell, seed) pairs ended under each of the five status words."""
    counts = Counter({"ok": len(selection.runs)})
    counts.update(absence.status for absence in selection.absent)
    asked = sum(counts.values())
    listed = ", ".join(f"{counts[word]} {word}" for word, _ in limits.STATUS_WORDS if counts[word])
    cells = text.count_of(len({cell.id for cell in plan.cells}), "cell")
    refused = (
        f" {text.count_of(len(plan.refused), 'further cell')} refused before running."
        if plan.refused
        else ""
    )
    meanings = "; ".join(
        f"{word}: {meaning}" for word, meaning in limits.STATUS_WORDS if counts[word]
    )
    size = f"{cells} × {text.count_of(len(plan.seeds), 'seed')} = {asked} runs asked for"
    return f"{size}: {listed or 'none'}.{refused} ({meanings}.)"


def _asides(material: Material, *, drawn: Collection[str]) -> list[str]:
    """Sentences about runs that are not drawn, and about bytes that were not counted.

    `drawn`: the clocks that the plan has a figure or table for.
    """
    selection = material.selection
    said = []
    diverged: dict[str, list[Run]] = {}

    for run in selection.runs:
        if run.result.get("diverged_step") is not None:
            diverged.setdefault(run.cell.label, []).append(run)

    for label, runs in diverged.items():
        where = ", ".join(
            f"seed {run.cell.seed} at step {run.result['diverged_step']}" for run in runs
        )
        said.append(f"Diverged: {label}, {where}; {'misses' if len(runs) > 1 else 'a miss'}.")

    virtual = 0 if "virtual" in drawn else len(material.in_virtual_time.runs)

    if virtual:
        said.append(
            f"{text.count_of(virtual, 'run')} of the virtual clock not drawn here: its seconds "
            "are not wall seconds."
        )

    if selection.elsewhere:
        machines = ", ".join(sorted({run.machine for run in selection.elsewhere}))
        said.append(
            f"{text.count_of(len(selection.elsewhere), 'run')} of other machines ({machines}) not "
            "drawn here."
        )

    if selection.repeats:
        said.append(
            f"{text.count_of(selection.repeats, 'run')} repeated a cell and seed; the newest ok "
            "one counts."
        )

    reasons = Counter(
        str(run.cost["wire_reason"]) for run in material.runs if run.cost.get("wire_reason")
    )
    for reason, count in sorted(reasons.items()):
        said.append(f"No wire bytes in {text.count_of(count, 'run')}: {reason}.")
    return said


def _footer(material: Material) -> str:
    codes = sorted({run.code_id for run in material.selection.runs})
    where = (
        f"Machine {material.selection.machine or 'unknown'}, commit {', '.join(material.commits)}"
    )
    return f"{where}, {text.count_of(len(codes), 'code id')}."
