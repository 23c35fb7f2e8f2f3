"""Writes the parts of the documentation that are facts of the project: results, members and verbs.

    python docs/generate.py            writes them anew
    python docs/generate.py --check    only says what is out of date; ends with 1 if anything is

A page holds such a part between the lines `<!-- begin NAME -->` and `<!-- end NAME -->`. All else
is written by hand. The results of the README are those of `results/reference/readme.csv`, which
`make readme` measures anew. Members and bytes are what `benchsuite list` and `benchsuite plan`
answer. Verbs are those of the parser of the command line.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import io
import json
import math
import statistics
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path("results") / "reference" / "readme.csv"

Block = Callable[[Path], str]  # the root of the clone -> Markdown


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Writes the generated parts of README.md and docs/."
    )
    parser.add_argument("--check", action="store_true", help="only say what is out of date")
    args = parser.parse_args(arguments)
    stale = out_of_date(ROOT)
    for page, text in stale.items():
        print(f"{page}: {first_difference((ROOT / page).read_text(encoding='utf-8'), text)}")
        if not args.check:
            (ROOT / page).write_text(text, encoding="utf-8")
    if args.check and stale:
        print("out of date: run `python docs/generate.py` and look at the difference")
    return int(args.check and bool(stale))


def out_of_date(root: Path) -> dict[str, str]:
    """Pages under `root` whose generated parts are out of date, each with its new text."""
    stale = {}
    for page, blocks in PAGES.items():
        text = (root / page).read_text(encoding="utf-8")
        new = text
        for name, make in blocks.items():
            new = replaced(new, page, name, make(root))
        if new != text:
            stale[page] = new
    return stale


def replaced(text: str, page: str, name: str, block: str) -> str:
    """The page's text with the named block in it. ValueError where the page has no place for it."""
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{page} needs the lines {begin.strip()!r} and {end!r}, each once")
    head, rest = text.split(begin)
    _, tail = rest.split(end)
    return f"{head}{begin}{block.rstrip()}\n{end}{tail}"


def first_difference(old: str, new: str) -> str:
    """The first line that differs, before and after, in words."""
    before, after = old.splitlines(), new.splitlines()
    for number, (a, b) in enumerate(zip(before, after, strict=False), start=1):
        if a != b:
            return f"line {number} is\n  {a}\nand should be\n  {b}"
    return f"{len(before)} lines, and should have {len(after)}"


# -- the table of the README -----------------------------------------------------------------------

STRATEGIES: Mapping[
    tuple[str, str, str], str
] = {  # (sync, topology, compression) -> how the table calls it, in order
    ("synchronous", "ring", "none"): "synchronous, ring all-reduce",
    ("synchronous", "parameter_server", "none"): "synchronous, parameter server",
    ("k_sync", "parameter_server", "none"): "does not wait for the slowest (k-sync)",
    ("stale_synchronous", "parameter_server", "none"): "may run 3 steps ahead (stale synchronous)",
    ("asynchronous", "parameter_server", "none"): "asynchronous, parameter server",
    ("delayed", "ring", "none"): "applies the mean one step late (delayed)",
    ("local_sgd", "ring", "none"): "averages every 8 steps (local SGD)",
    ("diloco", "ring", "none"): "outer step every 8 steps (DiLoCo)",
    ("elastic_averaging", "ring", "none"): "tied to a centre (elastic averaging)",
    ("gossip", "exponential", "none"): "mixes with one neighbour (gossip)",
    ("synchronous", "native", "powersgd"): "synchronous, rank-2 gradients (PowerSGD)",
    ("synchronous", "native", "topk"): "synchronous, largest 1 % (top-k)",
    ("synchronous", "native", "ef_sign"): "synchronous, one bit each (EF-sign)",
}


def results_table(root: Path) -> str:
    """One row per strategy: samples and seconds to the target, bytes per sample. Then where."""
    with open(root / RESULTS, encoding="utf-8", newline="") as file:
        runs = list(csv.DictReader(file))
    groups: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for run in runs:
        groups.setdefault((run["sync"], run["topology"], run["compression"]), []).append(run)
    if groups.keys() != STRATEGIES.keys():
        raise ValueError(
            f"{RESULTS} and STRATEGIES differ in {sorted(groups.keys() ^ STRATEGIES.keys())}"
        )
    rows = [_result_row(label, groups[key]) for key, label in STRATEGIES.items()]
    target, budget, workers = (
        _one(runs, name) for name in ("target_metric", "samples", "replicas")
    )
    seeds = len({run["seed"] for run in runs})
    header = (
        "strategy",
        f"samples to {float(target):g} %",
        "bytes per sample",
        "virtual s to target",
    )
    return "\n".join(
        [
            *markdown_table(header, rows, right=(1, 2, 3)),
            "",
            f"A CNN on 1797 real digits, {workers} workers, median [range] of {seeds} seeds. "
            f"`>`: the budget of {int(budget):,} samples was used up first, in so many of them. "
            f"Links of {float(_one(runs, 'link_mbit')):,.0f} Mbit/s; no learning rate was tuned.",
            f"Machine `{_one(runs, 'machine')}`, commit `{_one(runs, 'commit')[:10]}`, plan "
            "[reports/readme.toml](reports/readme.toml).",
        ]
    )


def _result_row(label: str, runs: Sequence[Mapping[str, str]]) -> tuple[str, ...]:
    wrong = [run["run_id"] for run in runs if run["status"] != "ok" or run["dirty"] != "false"]
    if wrong:
        raise ValueError(f"{label}: runs {wrong} did not end ok, or their commit was not clean")
    samples = [_number(run["samples_to_target"]) for run in runs]
    seconds = [_number(run["virtual_time_to_target_s"]) for run in runs]
    per_sample = float(_one(runs, "payload_bytes_per_sample"))
    budget = f"> {int(_one(runs, 'samples')):,}"
    return (
        label,
        censored(samples, lambda value: f"{value:,.0f}", budget),
        f"{round(per_sample):,}",
        censored(seconds, lambda value: f"{value:.2f}", "–"),
    )


def censored(values: Sequence[float], shown: Callable[[float], str], missed: str) -> str:
    """Median and range of one value per seed; a seed that missed is infinite in both.

    `missed` stands for an infinite value: `> 15,360`, after which the number of misses is told,
    or a bare dash.
    """
    count = sum(math.isinf(value) for value in values)
    never = f"{missed} ({count} of {len(values)})" if missed.startswith(">") else missed
    middle = statistics.median(values)
    if math.isinf(middle):
        return never
    return f"{shown(middle)} [{shown(min(values))} to {never if count else shown(max(values))}]"


def _number(text: str) -> float:
    return float(text) if text else math.inf


def _one(runs: Sequence[Mapping[str, str]], column: str) -> str:
    """The value that all runs have in this column."""
    values = {run[column] for run in runs}
    if len(values) != 1:
        raise ValueError(f"{RESULTS}: {column} has the values {sorted(values)}, and one is needed")
    return values.pop()


# -- members and bytes -----------------------------------------------------------------------------


def options_of(kind: str) -> Block:
    """A block: every option of every member of an axis."""

    def block(root: Path) -> str:
        rows = []
        for member in answer("list", kind)[kind]:
            for option in member["options"]:
                shown = json.dumps(option["default"])
                rows.append(
                    (f"`{member['name']}`", f"`{option['name']}`", f"`{shown}`", option["help"])
                )
        return "\n".join(markdown_table(("member", "option", "default", "meaning"), rows))

    return block


def bytes_per_step(root: Path) -> str:
    """Predicted bytes of a global batch with four workers, in M: legal strategies x topologies."""
    return _matrix("sync", "topology", "--compression", "none")


def compressed_bytes(root: Path) -> str:
    """The same of every compression, under the synchronous strategy."""
    return _matrix("compression", "topology", "--sync", "synchronous")


def _matrix(rows: str, columns: str, *fixed: str) -> str:
    names = {
        kind: [member["name"] for member in answer("list", kind)[kind]] for kind in (rows, columns)
    }
    flags = [f"--{kind}={','.join(values)}" for kind, values in names.items()]
    cell = ["--workload", "cnn", "--preset", "digits", "--replicas", "4", *fixed, *flags]
    documents = answer("plan", *cell, "--set", "budget.steps=8")
    found: dict[tuple[str, str], float] = {}
    for each in documents["cells"]:
        words = each["label"].split()
        row = next((name for name in names[rows] if name in words), "none")
        column = next(name for name in names[columns] if name in words)
        found[row, column] = each["predicted_bytes"] / (8 * NUM_BYTES)
    used = [name for name in names[columns] if any((row, name) in found for row in names[rows])]
    table = []
    for row in names[rows]:
        values = [found.get((row, column)) for column in used]
        if any(value is not None for value in values):
            table.append(
                (f"`{row}`", *("" if value is None else f"{value:.3g}" for value in values))
            )
    header = ("", *(f"`{name}`" for name in used))
    return "\n".join(markdown_table(header, table, right=range(1, len(header))))


NUM_BYTES = 101_480  # M of cnn/digits: 25,370 parameters of 4 bytes


# -- the command line ------------------------------------------------------------------------------


def command_line() -> ModuleType:
    """The module that pyproject.toml names as the command: it has `main` and `build_parser`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return importlib.import_module(project["project"]["scripts"]["benchsuite"].partition(":")[0])


def parser_of_the_command_line() -> argparse.ArgumentParser:
    """The parser with all verbs."""
    parser: argparse.ArgumentParser = command_line().build_parser()
    return parser


def answer(*arguments: str) -> Any:
    """What `benchsuite ARGUMENTS --json` prints, as a document. No stored run is looked at."""
    out = io.StringIO()
    with tempfile.TemporaryDirectory() as empty, contextlib.chdir(ROOT):
        results = ["--results", empty] if arguments[0] == "plan" else []
        with contextlib.redirect_stdout(out):
            code = command_line().main([*arguments, *results, "--json"])
    if code != 0:
        raise ValueError(f"benchsuite {' '.join(arguments)} ended with {code}")
    return json.loads(out.getvalue())


def verbs(root: Path) -> str:
    """A section per verb: what it does, and its arguments."""
    sections = []
    for name, summary, parser in verbs_of(parser_of_the_command_line()):
        usage = " ".join([f"benchsuite {name}", *(_placed(each) for each in positional(parser))])
        sections += [f"## {name}", "", f"`{usage}`: {summary}.", ""]
        rows = [(f"`{_written(each)}`", _explained(each)) for each in _own(parser)]
        sections += [*markdown_table(("argument", "meaning"), rows), ""] if rows else []
        if any(_is_cell_flag(each) for each in parser._actions):
            sections += ["It also takes the [flags of a single cell](#flags-of-a-single-cell).", ""]
    cell = [each for each in _any_cell_flags() if _is_cell_flag(each)]
    flags = ", ".join(f"`{_written(each)}`" for each in cell)
    sections += [
        "## Flags of a single cell",
        "",
        "Instead of the name of a plan, a verb may be given one cell:",
        "",
    ]
    sections += [f"{flags}.", "", "A list as in `--replicas 1,2,4` gives a cell for each value."]
    return "\n".join(sections)


def verbs_of(parser: argparse.ArgumentParser) -> list[tuple[str, str, argparse.ArgumentParser]]:
    """(name, summary, parser) of every verb, in the order of `benchsuite --help`."""
    (group,) = (each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    summaries = {each.dest: each.help or "" for each in group._choices_actions}
    return [(name, summaries[name], each) for name, each in group.choices.items()]


def positional(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The arguments without a flag."""
    return [each for each in parser._actions if not each.option_strings]


def _own(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Those that get a row, the ones without a flag first: not `--help`, nor flags of a cell."""
    mine = [each for each in parser._actions if each.dest != "help" and not _is_cell_flag(each)]
    return sorted(mine, key=lambda each: bool(each.option_strings))


def _any_cell_flags() -> list[argparse.Action]:
    """All arguments of `benchsuite run`, which takes a cell."""
    return next(
        parser._actions
        for name, _, parser in verbs_of(parser_of_the_command_line())
        if name == "run"
    )


def _is_cell_flag(action: argparse.Action) -> bool:
    return action.dest.startswith("cell_")


def _placed(action: argparse.Action) -> str:
    name = _value(action) or action.dest
    return f"[{name}]" if action.nargs == "?" else name


def _written(action: argparse.Action) -> str:
    """`--set KEY=VALUE`, `--json`, `PLAN`."""
    return " ".join([*action.option_strings[-1:], _value(action)]).strip()


def _value(action: argparse.Action) -> str:
    """The word that stands for the argument's value; empty for a switch."""
    if action.nargs == 0:
        return ""
    if isinstance(action.metavar, str):
        return f"{action.metavar} .." if action.nargs == "+" else action.metavar
    return "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()


def _explained(action: argparse.Action) -> str:
    again = "; may be given several times" if isinstance(action, argparse._AppendAction) else ""
    return f"{(action.help or '').strip()}{again}"


# -- Markdown --------------------------------------------------------------------------------------


def markdown_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[int] = ()
) -> list[str]:
    """The lines of a table; `right`: the columns of numbers."""
    aligned = set(right)
    rule = ["---:" if column in aligned else "---" for column in range(len(header))]
    return [_row(header), _row(rule), *(_row(row) for row in rows)]


def _row(values: Sequence[str]) -> str:
    return "| " + " | ".join(value.replace("|", "\\|") for value in values) + " |"


def kinds_of_figures(root: Path) -> str:
    """Every kind of figure and table with its title, its clock and the keys of its own."""
    del root  # read from the files of the kinds
    kinds = importlib.import_module("benchsuite.report.kinds")
    rows = []
    for name in kinds.names():
        kind = kinds.find(name).kind
        keys = "; ".join(f"{key}: {', '.join(filter(None, kind.keys[key]))}" for key in kind.keys)
        rows.append((f"`{name}`", kind.title, kind.clock, keys))
    return "\n".join(markdown_table(("kind", "title", "clock", "keys of its own"), rows))


PAGES: Mapping[str, Mapping[str, Block]] = {  # page -> its generated parts
    "README.md": {"results": results_table},
    "docs/strategies.md": {
        "bytes": bytes_per_step,
        "compressed bytes": compressed_bytes,
        "options of sync": options_of("sync"),
        "options of topology": options_of("topology"),
        "options of compression": options_of("compression"),
        "options of parallel": options_of("parallel"),
    },
    "docs/workloads.md": {"options of workload": options_of("workload")},
    "docs/results.md": {"kinds": kinds_of_figures},
    "docs/command-reference.md": {"verbs": verbs},
}

if __name__ == "__main__":
    sys.exit(main())
