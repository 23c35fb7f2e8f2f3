"""A table of the page and its files: CSV (numbers), Markdown (as printed), TeX with booktabs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd


@dataclass(frozen=True)
class Column:
    """One numeric column: where it comes from, how it is printed, what it means."""

    key: str
    heading: str
    meaning: str
    scale: float = 1.0
    better: str = ""  # "max", "min" or "" = nothing is best
    wall: bool = False  # a flagged row claims nothing here
    si: bool = False  # bytes: printed with a decimal prefix


@dataclass(frozen=True)
class Value:
    """One field: centre and spread as printed, and the number it sorts by."""

    text: str
    spread: str = ""
    sort: float | str = ""
    bold: bool = False

    @property
    def plain(self) -> str:
        """Centre and spread in one text: `5,120 [4,800–5,440]`."""
        spread = self.spread if self.spread.startswith("(") else f"[{self.spread}]"
        return f"{self.text} {spread}" if self.spread else self.text


@dataclass(frozen=True)
class Table:
    """A table as it is printed, with the numbers behind it."""

    name: str
    caption: str
    headings: list[tuple[str, str]]
    rows: list[list[Value]]
    breaks: list[bool]  # row -> it starts a group
    numbers: pd.DataFrame
    cell_ids: list[str] = field(default_factory=list)


def save(table: Table, folder: Path) -> None:
    """Writes name.tex (booktabs), .csv (numbers) and .md (as printed) under `folder`."""
    (folder / f"{table.name}.csv").write_text(
        table.numbers.to_csv(index=False, lineterminator="\n"), encoding="utf-8"
    )
    (folder / f"{table.name}.md").write_text(markdown(table), encoding="utf-8")
    (folder / f"{table.name}.tex").write_text(latex(table), encoding="utf-8")


def markdown(table: Table) -> str:
    """A GitHub table, best values in bold, the caption below."""
    lines = ["| " + " | ".join(heading for heading, _ in table.headings) + " |"]
    lines.append("|" + "---|" * len(table.headings))
    for row in table.rows:
        cells = [f"**{value.plain}**" if value.bold else value.plain for value in row]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + f"\n\n{table.caption}\n"


def latex(table: Table) -> str:
    """A booktabs table by `Styler.to_latex(hrules=True)`; it needs only the booktabs package."""
    frame = pd.DataFrame([[value.plain for value in row] for row in table.rows])
    bold = pd.DataFrame(
        [["font-weight: bold" if value.bold else "" for value in row] for row in table.rows]
    )
    styler = frame.style.format(escape="latex").apply(lambda _: bold, axis=None).hide(axis="index")
    styler = styler.relabel_index(
        [_escaped(heading) for heading, _ in table.headings], axis="columns"
    )
    text: str = styler.to_latex(
        hrules=True,
        convert_css=True,
        column_format="l" + "r" * (len(table.headings) - 2) + "l",
        caption=_escaped(table.caption),
    )
    return text.replace("–", "--").replace("≥", r"$\geq$").replace("≤", r"$\leq$")


def _escaped(text: str) -> str:
    return "".join(f"\\{c}" if c in "%&#_$" else c for c in text)
