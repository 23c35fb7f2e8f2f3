"""The answer of `benchsuite verify` as plain text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchsuite.report import text


def table(document: Mapping[str, Any]) -> str:
    """One line per law and strategy, then per law its twins, what is unsupported, what fails, the
    sum."""
    lines = text.aligned(
        [
            ("law", "strategy", "worst", "bound", "cells", ""),
            *(
                (
                    line["law"],
                    line["strategy"],
                    _number(line["value"], line),
                    f"<= {_number(line['bound'], line)}",
                    str(line["cells"]),
                    "holds" if line["holds"] else "FAILS",
                )
                for line in document["laws"]
            ),
        ]
    )
    lines += ["", "broken twins"]
    lines += text.aligned([(twins["law"], _caught(twins)) for twins in document["twins"]])
    if document["unsupported"]:
        lines += ["", "unsupported"]
        lines += text.aligned(
            [(told["strategy"], told["reason"]) for told in document["unsupported"]]
        )
    return "\n".join([*lines, "", *_failures(document), _sum(document)])


def _failures(document: Mapping[str, Any]) -> list[str]:
    """Each with both numbers."""
    lines = []
    for line in document["laws"]:
        if not line["holds"]:
            numbers = (
                f"{_number(line['value'], line)} is not <= {_number(line['bound'], line)}: "
                f"{line['detail']}"
            )
            lines.append(f"FAILS: {line['law']}, {line['strategy']}: {line['error'] or numbers}")
    for twins in document["twins"]:
        lines += [f"NOT CAUGHT: {twins['law']}: {missed}" for missed in twins["missed"]]
    return lines


def _sum(document: Mapping[str, Any]) -> str:
    laws = document["laws"]
    twins = document["twins"]
    names = len({line["law"] for line in laws})
    held = sum(line["holds"] for line in laws)
    caught, num = (sum(each[name] for each in twins) for name in ("caught", "twins"))
    told = (
        f"{names} laws: {held} of {len(laws)} lines hold; {caught} of {num} broken twins caught; "
    )
    told += f"{len(document['unsupported'])} unsupported; "
    replicas = ",".join(map(str, document["replicas"]))
    return f"{told}replicas {replicas}, {document['clock']} clock, {document['seconds']:.0f} s"


def _caught(twins: Mapping[str, Any]) -> str:
    return f"{twins['caught']} of {twins['twins']} caught"


def _number(value: float | None, line: Mapping[str, Any]) -> str:
    if line["error"] and not line["cells"]:
        return "-"
    return "nan" if value is None else f"{value:.3g}"
