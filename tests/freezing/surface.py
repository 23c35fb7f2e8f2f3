"""What a user sees before anything runs: members, help pages, columns, the schema of a run file."""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from pathlib import Path

from tests import synthetic_runs as made
from tests.freezing.doors import ROOT, internal, relative, say
from tests.freezing.golden import Part


def members() -> str:
    """`benchsuite list --json`, its paths relative to the repository."""
    listing = json.loads(say("list", "--json"))
    for kind in listing.values():
        for member in kind:
            member["path"] = relative(member["path"])
    return json.dumps(listing, indent=1, sort_keys=True) + "\n"


def help_pages() -> str:
    """`--help` of the program and of every verb that it names."""
    front = say("--help")
    verbs = re.findall(r"^    ([a-z][a-z_-]*)(?: |$)", front, flags=re.MULTILINE)
    assert len(verbs) > 5, f"no verbs in the help page: {front}"
    pages = [front, *(say(verb, "--help") for verb in verbs)]
    titles = ["benchsuite", *(f"benchsuite {verb}" for verb in verbs)]
    return "\n".join(
        f"===== {title} --help\n{page}" for title, page in zip(titles, pages, strict=True)
    )


def columns() -> str:
    """Names and types of the columns, then rows of made-up runs as `export csv` has them."""
    kinds = [f"{name}: {kind}" for name, kind in internal("COLUMNS").items()]
    with tempfile.TemporaryDirectory() as folder:
        results, series = Path(folder, "results"), Path(folder, "series")
        _store_some(results)
        table = say("export", "csv", "--results", str(results), "--series", str(series))
        heads = []
        for path in sorted(series.iterdir()):
            heads.append(f"{path.name}: {path.read_text(encoding='utf-8').splitlines()[0]}")
    header = table.splitlines()[0].split(",")
    assert header == list(internal("COLUMNS")), "the csv has other columns than the table"
    return "\n".join(["columns", *kinds, "", "series", *heads, "", "rows", rounded(table)])


def rounded(text: str) -> str:
    """Floats to 9 digits: the last ones are those of the machine's own mathematics library."""
    return re.sub(r"\d+\.\d{6,}(e-?\d+)?", lambda number: f"{float(number[0]):.9g}", text)


def _store_some(results: Path) -> None:
    """One run of every strategy, topology, number of workers and status of the made-up ones."""
    store = internal("Store")(results)
    identity = store.write_environment(made.MACHINE, made.ENVIRONMENT)
    kinds = {}
    for run in made.quick_runs():
        kinds[run.cell.sync, run.cell.topology, run.cell.replicas, str(run.status)] = run
    for run in kinds.values():
        store.write(dataclasses.replace(run, environment_id=identity))


def schema() -> str:
    """The JSON schema of a run file."""
    (path,) = (ROOT / "benchsuite").rglob("run.schema.json")
    return json.dumps(json.loads(path.read_text(encoding="utf-8")), indent=1, sort_keys=True) + "\n"


PARTS = (
    Part("list", "list.json", members, cheap=True),
    Part("help", "help.txt", help_pages, cheap=True),
    Part("columns", "columns.txt", columns, cheap=True),
    Part("schema", "run.schema.json", schema, cheap=True),
)
