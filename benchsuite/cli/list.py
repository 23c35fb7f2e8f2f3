"""`benchsuite list`: members of an axis with their options and files; plans with their question."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from benchsuite.cli.flags import Parents, Verbs
from benchsuite.cli.printing import print_json

# Every kind of plug-in, and the plans.
KINDS = ("workload", "parallel", "sync", "topology", "compression", "cluster", "report")


def add_parser(verbs: Verbs, parents: Parents) -> None:
    """Adds the verb."""
    parser = verbs.add_parser(
        "list", parents=[parents.json], help="members of an axis, their options and files"
    )
    parser.add_argument("kind", nargs="?", choices=KINDS, metavar="KIND", help=" | ".join(KINDS))


def run(args: Namespace) -> int:
    """Lists what there is of one kind, or of all; members are read and not imported."""
    kinds = [args.kind] if args.kind else KINDS
    listing = {kind: _plans() if kind == "report" else _members(kind) for kind in kinds}
    if args.json:
        print_json(listing)
        return 0

    from benchsuite.report import text  # only where a table is printed: `--help` needs none

    for kind, members in listing.items():
        print(kind if args.kind is None else f"{kind}:")
        rows = []

        for member in members:
            rows.append((member["name"], f"{member['summary']}  [{member['path']}]"))
            for option in member.get("options", ()):
                said = f"  {option['name']} = {option['default']!r}  {option['help']}"
                rows.append(("", said))

        for line in text.aligned(rows, indent=2):
            print(line)

    return 0


def _members(kind: str) -> list[dict[str, Any]]:
    """The members of a kind with their options, as `--json` prints them; read without importing."""
    from benchsuite.plan import plugins

    found = []

    for name in plugins.names(kind):
        member = plugins.find(kind, name)
        options = [
            {"name": o.name, "type": o.type, "default": o.default, "help": o.help}
            for o in member.options.values()
        ]
        listing: dict[str, Any] = {
            "name": name,
            "summary": member.summary,
            "path": str(member.path),
            "options": options,
        }
        if member.presets:
            listing["presets"] = list(member.presets)

        found.append(listing)

    return found


def _plans() -> list[dict[str, Any]]:
    """The plans with their questions. One that cannot be read is listed with the reason."""
    import tomllib

    from benchsuite.plan import plan

    found = []

    for name, path in plan.available().items():
        try:
            question = tomllib.loads(path.read_text(encoding="utf-8")).get("question", "")
        except (OSError, ValueError) as error:
            question = f"cannot be read: {error}"

        found.append({"name": name, "summary": question, "path": str(path)})

    return found
