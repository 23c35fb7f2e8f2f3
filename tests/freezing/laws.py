"""Which laws are shown on which strategies, with how many broken twins, and what they find."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from benchsuite.laws import Figure, Law, families
from tests.freezing.doors import internal, say
from tests.freezing.golden import Part

EXACT = (
    1e-6  # under a bound as small as this stand roundings, which are other ones on another machine
)


def lines(clock: str, workers: Sequence[int]) -> str:
    """Every line of `benchsuite verify` and the number of its twins; nothing is trained."""
    asked = internal("Asked")(clock=clock, workers=tuple(workers))
    with _hollow_laws():
        document = internal("verify").run(asked)
    assert document["exit_code"] == 0, "laws that look at nothing hold, and their twins do not"
    return _table(document, lambda line: f"{line['cells']} cells")


def in_virtual_time() -> str:
    """What `benchsuite verify --clock virtual` finds with 2 and 3 workers."""
    document = json.loads(
        say("verify", "--clock", "virtual", "--replicas", "2,3", "--json", allow=(0, 1))
    )
    return _table(document, _found)


def _found(line: Mapping[str, Any]) -> str:
    value, bound = line["value"], line["bound"]
    told = "holds" if line["holds"] else f"FAILS {line['error']}"
    rounding = bound is None or value is None or 0 < value <= EXACT
    shown = "" if rounding else f"{value:.2g} "
    return f"{line['cells']} cells, {told}, {shown}<= {bound:.3g}"


def _table(document: Mapping[str, Any], told: Any) -> str:
    """A law with the strategies below it; then its twins; then what nothing can be shown on."""
    laws, twins = document["laws"], document["twins"]
    num_laws = len({line["law"] for line in laws})
    num_cells = sum(line["cells"] for line in laws)
    num_twins = sum(each["twins"] for each in twins)
    shown = [
        f"{num_laws} laws, {len(laws)} lines, {num_cells} cells, "
        f"{num_twins} twins, {len(document['unsupported'])} unsupported; "
        f"{document['clock']} clock, replicas {', '.join(map(str, document['replicas']))}"
    ]
    by_law: dict[str, list[str]] = {}
    for line in laws:
        by_law.setdefault(f"{line['family']}: {line['law']}", []).append(
            f"    {line['strategy']}: {told(line)}"
        )
    of_law = {f"{each['family']}: {each['law']}": each for each in twins}
    for law in sorted(by_law):
        each = of_law[law]
        shown += [
            "",
            f"{law} ({each['twins']} twins, {each['caught']} caught)",
            *sorted(by_law[law]),
        ]
    shown += ["", "unsupported"]
    for each in sorted(document["unsupported"], key=lambda each: str(each["strategy"])):
        shown.append(f"    {each['strategy']}: {each['reason']}: {each['remedy']}")
    return "\n".join(shown) + "\n"


@contextlib.contextmanager
def _hollow_laws() -> Iterator[None]:
    """Laws that look at nothing: they hold, their twins do not, and nobody asks for ranks."""
    verify = internal("verify")
    hollow = {family: tuple(map(_hollow, laws)) for family, laws in families().items()}
    before = verify.families, verify._Ranks.of
    verify.families = lambda: hollow
    verify._Ranks.of = lambda ranks, cell: None
    try:
        yield
    finally:
        verify.families, verify._Ranks.of = before


def _hollow(law: Law) -> Law:
    def holds(ranks: Any, cell: Any) -> Figure:
        return Figure(0.0, 1.0)

    def fails(ranks: Any, cell: Any) -> Figure:
        return Figure(2.0, 1.0)

    controls = tuple(dataclasses.replace(control, check=fails) for control in law.controls)
    return dataclasses.replace(law, check=holds, controls=controls)


PARTS = (
    Part("laws-wall", "laws-wall.txt", partial(lines, "wall", (1, 2, 3, 4)), cheap=True),
    Part("laws-virtual", "laws-virtual.txt", partial(lines, "virtual", (2, 3)), cheap=True),
    Part("verify-virtual", "verify-virtual.txt", in_virtual_time, slow=True),
)
