"""What `benchsuite plan` says before anything runs: ranks, bytes, estimated time, refusals.

The predicted bytes come from the strategy's own file and the parameters' shapes, so torch is
imported for them.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from benchsuite import rules
from benchsuite.cluster import cells_file
from benchsuite.errors import UsageError
from benchsuite.plan.cell import Cell
from benchsuite.plan.placement import ports
from benchsuite.plan.plan import Plan
from benchsuite.report import text
from benchsuite.results.store import CodeId, Store
from benchsuite.results.tuned import is_tuned
from benchsuite.running import tune
from benchsuite.running.runner import estimated_seconds, known_seconds, timed_as, total


def forecast(plan: Plan, store: Store, *, code_id: CodeId) -> dict[str, Any]:
    """A plan's forecast as one JSON document.

    `{"plan", "question", "seeds", "cells", "refused", "runs", "trials", "missing", "estimated_s",
    "notices"}`. runs and missing count the trials of tuned cells too. estimated_s: of the missing
    runs, None where one of them is not known. notices: what the numbers of some cells do not mean,
    `[{"rule", "reason", "remedy", "cell_ids", "concerns"}]`.
    """

    # The store is asked once for all cells: it holds many more runs than a plan.
    known = estimated_seconds(store)
    missing_runs = store.missing(plan.cells, plan.seeds, code_id)
    untried = tune.untried(missing_runs, store, code_id)
    missing = Counter(cell.id for cell in missing_runs)
    missing_trials = Counter(cell.id for cell in untried)
    num_trials = sum(len(tune.trials(cell)) for cell in plan.cells)
    cells = []

    for cell in plan.cells:
        entry = _predicted(cell)
        entry["missing"] = missing[cell.id]
        entry["trials"] = sum(missing_trials[trial.id] for trial in tune.trials(cell))
        entry["estimated_s"] = known_seconds(known, timed_as(cell))
        cells.append(entry)

    return {
        "plan": plan.name,
        "question": plan.question,
        "seeds": list(plan.seeds),
        "cells": cells,
        "refused": [_refused(each.cell, each.problems) for each in plan.refused],
        "excluded": plan.num_excluded,
        "runs": len(plan.cells) * len(plan.seeds) + num_trials,
        "trials": num_trials,
        "missing": len(missing_runs) + len(untried),
        "estimated_s": total(
            known_seconds(known, timed_as(cell)) for cell in (*untried, *missing_runs)
        ),
        "notices": [_notice(notice) for notice in rules.noticed(plan.cells)],
    }


def _predicted(cell: Cell) -> dict[str, Any]:
    """What is known of a cell without running it.

    predicted_bytes: of one run, all ranks together. kept_bytes: what the strategy keeps on a worker
    and on a server, beside parameters, gradient and optimiser.
    """
    from benchsuite.worker.predict import kept, predicted

    traffic = predicted(cell)

    return {
        "cell_id": cell.id,
        "label": cell.label,
        "ranks": cell.world_size,
        "workers": cell.num_workers,
        "servers": cell.num_servers,
        "samples": cell.budget.samples,
        "predicted_bytes": traffic.payload_bytes,
        "predicted_messages": traffic.num_messages,
        "busiest_port_bytes": traffic.busiest_port(ports(cell)),
        "kept_bytes": kept(cell),
    }


def table(document: dict[str, Any]) -> str:
    """The forecast as plain text."""
    header = (
        "cell",
        "",
        "ranks",
        "missing",
        "predicted per run",
        "messages",
        "kept by a worker",
        "estimated per run",
    )
    rows = [_row(cell, len(document["seeds"])) for cell in document["cells"]]
    lines = [document["question"]] if document["question"] else []
    lines += text.aligned([header, *rows])

    for refusal in document["refused"]:
        lines.append(f"refused  {refusal['cell_id']}  {refusal['label']}")
        for problem in refusal["problems"]:
            lines.append(f"         {problem['reason']}: {problem['remedy']}")

    for notice in document["notices"]:
        lines.append(f"notice   {notice['concerns']}")
        lines.append(f"         {notice['reason']}: {notice['remedy']}")

    return "\n".join([*lines, _last_line(document)])


def _row(cell: dict[str, Any], num_seeds: int) -> tuple[str, ...]:
    """A cell's line of the table; `num_seeds` is the number of runs that it has in the plan."""
    trials = f" + {cell['trials']} trials" if cell["trials"] else ""
    kept_bytes = cell["kept_bytes"]["worker"]

    return (
        cell["cell_id"],
        cell["label"],
        f"{cell['workers']}+{cell['servers']}",
        f"{cell['missing']}/{num_seeds}{trials}",
        text.binary(cell["predicted_bytes"]),
        str(cell["predicted_messages"]),
        "" if kept_bytes is None else text.binary(kept_bytes),
        text.duration(cell["estimated_s"]),
    )


def _last_line(document: dict[str, Any]) -> str:
    """The sum over all cells: runs, how many are missing, and how long they will take."""
    trials = ""
    if document["trials"]:
        trials = f"; {document['trials']} of them trials of tuning, seed {tune.TRIAL_SEED}"
    seeds = ", ".join(map(str, document["seeds"]))
    return (
        f"{document['runs']} runs ({len(document['cells'])} cells, seeds {seeds}{trials}), "
        f"{document['missing']} missing, estimated {text.duration(document['estimated_s'])}; "
        f"{len(document['refused'])} refused, {document['excluded']} excluded"
    )


def write_cells(plan: Plan, path: Path) -> str:
    """Writes cells.json, one entry per cell and seed; returns the ranks that they need, in words.

    UsageError where no cell is left, one must be tuned, or the file cannot be written.
    """
    all_cells = [*plan.cells, *(each.cell for each in plan.refused)]
    tuned = [cell for cell in all_cells if is_tuned(cell)]
    if tuned:
        raise UsageError(
            f"{plan.name}: {tuned[0].label}: tuning = per_strategy needs trials, which only "
            "`benchsuite run` makes: write the others with --only 'tuning == same', or all with "
            "--set tuning=same, and an lr_factor that a local run chose (column tuned_lr_factor)"
        )

    cells = plan.runs()
    if not cells:
        reasons = "; ".join(each.reason for each in plan.refused) or "the plan has none"
        raise UsageError(f"{plan.name}: no cell to write: {reasons}")

    cells_file.write(path, cells)
    ranks = sorted(Counter(cell.world_size for cell in cells).items())
    return ", ".join(f"{size} ranks for {count} of them" for size, count in ranks)


def _refused(cell: Cell, problems: Any) -> dict[str, Any]:
    """A refused cell with its problems, as the JSON document states it."""
    stated = [{"rule": p.rule, "reason": p.reason, "remedy": p.remedy} for p in problems]
    return {"cell_id": cell.id, "label": cell.label, "problems": stated}


def _notice(notice: rules.Notice) -> dict[str, Any]:
    """A notice with the ids of its cells, as the JSON document states it."""
    problem = notice.problem
    document: dict[str, Any] = {
        "rule": problem.rule,
        "reason": problem.reason,
        "remedy": problem.remedy,
    }
    return document | {"cell_ids": [cell.id for cell in notice.cells], "concerns": notice.concerns}
