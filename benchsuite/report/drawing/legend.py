"""Legends of the page as HTML, where saved files have a strip on top of the picture."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from benchsuite.report.drawing.canvas import Entry
from benchsuite.report.drawing.style import Look

_SHAPES = {
    "o": '<circle cx="15" cy="6" r="3.2"/>',
    "s": '<rect x="12" y="3" width="6" height="6"/>',
    "D": '<path d="M15 2 19 6 15 10 11 6Z"/>',
    "^": '<path d="M15 2 19 9.5 11 9.5Z"/>',
    "v": '<path d="M15 10 19 2.5 11 2.5Z"/>',
    "<": '<path d="M11 6 18 2 18 10Z"/>',
    ">": '<path d="M19 6 12 2 12 10Z"/>',
    "P": '<path d="M13.6 2h2.8v2.6h2.6v2.8h-2.6v2.6h-2.8v-2.6h-2.6v-2.8h2.6z"/>',
    "X": '<path d="M11 4 13 2 15 4 17 2 19 4 17 6 19 8 17 10 15 8 13 10 11 8 13 6Z"/>',
    "*": '<path d="M15 1.4 16.2 4.7 19.8 4.8 17 7 18 10.4 15 8.4 12 10.4 13 7 10.2 4.8 13.8 '
    '4.7Z"/>',
}


def entry(of: Entry) -> dict[str, Any]:
    """The label of one legend entry, and its mark, line or area as a small SVG."""
    if not isinstance(of, Look):
        color, label = of
        return {
            "label": label,
            "swatch": _swatch(f'<rect width="12" height="12" fill="{color}"/>', width=12),
        }

    dash = f' stroke-dasharray="{" ".join(f"{d * 1.5:g}" for d in of.dash)}"' if of.dash else ""
    line = f'<path d="M0 6H30" stroke="{of.color}" stroke-width="1.8"{dash}/>' if of.joined else ""
    shape = _SHAPES.get(of.marker, _SHAPES["o"])
    mark = f'<g fill="{of.color}" stroke="#fff" stroke-width="0.6">{shape}</g>'
    return {"label": of.label, "swatch": _swatch(line + mark)}


def _swatch(body: str, *, width: int = 30) -> Markup:
    return Markup(
        f'<svg width="{width}" height="12" viewBox="0 0 {width} 12" aria-hidden="true">{body}</svg>'
    )
