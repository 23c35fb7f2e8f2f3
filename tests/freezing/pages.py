"""The page of every plan, of made-up runs: its text, and what each picture shows as numbers."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests import synthetic_runs as made
from tests.freezing.doors import internal
from tests.freezing.golden import Part
from tests.freezing.made_runs import made_run
from tests.freezing.surface import rounded

# Plans with many cells are drawn with fewer seeds and sizes: no figure is lost by that.
SEEDS = {"scaling": (0, 1), "sync": (0, 1, 2)}
ONLY = {"scaling": "replicas != 64 and replicas != 2 and replicas != 256"}
CHEAP = ("rl",)
LONGEST = 8  # numbers that are written out; of more, the first, the last and a hash of all


def page(name: str) -> str:
    """index.html, then the tables as printed, then each figure's data."""
    path = f"reports/{name}.toml"
    plan = internal("plan.load")(path, seeds=SEEDS.get(name), only=ONLY.get(name))
    with tempfile.TemporaryDirectory() as folder:
        results, out = Path(folder, "results"), Path(folder, "page")
        store = internal("Store")(results)
        identity = store.write_environment(made.MACHINE, made.ENVIRONMENT)
        for cell in plan.cells:
            for seed in plan.seeds:
                store.write(_dated(made_run(cell, seed), identity))
        with _pictures() as drawn:
            internal("render_stored")(plan, store, out)
        html = (out / "index.html").read_text(encoding="utf-8")
        tables = [
            (path.name, path.read_text(encoding="utf-8"))
            for path in sorted((out / "tables").iterdir())
        ]
    assert len(drawn) == html.count("<figcaption"), (
        "a figure was saved in a way that is not looked at here"
    )
    shown = ["===== index.html", _text(html)]
    for title, text in tables:
        if title.endswith(".csv"):
            shown += [f"===== tables/{title}", rounded(text)]
    for title in sorted(drawn):
        shown += [f"===== figures/{title}", *drawn[title], ""]
    return "\n".join(shown)


def _dated(run: Any, environment_id: str) -> Any:
    return dataclasses.replace(run, environment_id=environment_id)


@contextlib.contextmanager
def _pictures() -> Iterator[dict[str, list[str]]]:
    """Figure name -> what it shows. Nothing is drawn: a file gets an empty picture."""
    from matplotlib.figure import Figure

    drawn: dict[str, list[str]] = {}
    before = Figure.savefig

    def savefig(figure: Figure, target: Any, *, format: str, **_more: Any) -> None:
        if format == "svg":
            target.write(b"<svg></svg>")
        else:
            Path(target).write_bytes(b"")
        if format == "pdf":
            drawn[Path(target).stem] = [line for axes in figure.axes for line in _axes(axes)]

    Figure.savefig = savefig  # type: ignore[assignment,method-assign]
    try:
        yield drawn
    finally:
        Figure.savefig = before  # type: ignore[method-assign]


def _axes(axes: Any) -> Iterator[str]:
    """Everything that one axes says, a line each."""
    box = " ".join(f"{value:.4f}" for value in axes.get_position().bounds)
    titles = [axes.get_title(loc=where) for where in ("left", "center", "right")]
    yield f"axes at {box}: {' | '.join(filter(None, titles))!r}"
    for name, axis, limits in (
        ("x", axes.xaxis, axes.get_xlim()),
        ("y", axes.yaxis, axes.get_ylim()),
    ):
        ticks = [label.get_text() for label in axis.get_ticklabels()]
        label = axis.get_label_text()
        yield f"  {name} {label!r}, {axis.get_scale()}, {_numbers(limits)}, ticks {ticks}"
    for line in axes.get_lines():
        look = f"{line.get_color()} {line.get_marker()} {line.get_linestyle()}"
        where = f"x {_numbers(line.get_xdata())}; y {_numbers(line.get_ydata())}"
        yield f"  line {line.get_gid() or ''} {look} {line.get_markerfacecolor()}: {where}"
    for patch in axes.patches:
        yield f"  patch {patch.get_gid() or ''} {_color(patch)}: {_numbers(_corners(patch))}"
    for area in axes.collections:
        corners = [value for path in area.get_paths() for value in path.vertices.flatten()]
        yield f"  area {_color(area)}: {_numbers([*corners, *area.get_offsets().flatten()])}"
    for text in axes.texts:
        yield f"  text {text.get_text()!r} at {_numbers(text.get_position())}, {text.get_color()}"


def _corners(patch: Any) -> list[float]:
    vertices = patch.get_patch_transform().transform_path(patch.get_path()).vertices
    return [float(value) for value in vertices.flatten()]


def _color(artist: Any) -> str:
    """Colours inside and at the edge, with their opacity."""
    from matplotlib.colors import to_hex, to_rgba_array

    inside, edge = to_rgba_array(artist.get_facecolor()), to_rgba_array(artist.get_edgecolor())
    return "/".join(
        ",".join(to_hex(color, keep_alpha=True) for color in colors) for colors in (inside, edge)
    )


def _numbers(values: Iterable[Any]) -> str:
    """To six digits, so that no machine's last ones matter."""
    shown = [value if isinstance(value, str) else f"{float(value):.6g}" for value in values]
    if len(shown) <= LONGEST:
        return f"[{' '.join(shown)}]"
    return (
        f"[{' '.join(shown[:3])} .. {shown[-1]}, {len(shown)} of them, {_digest(' '.join(shown))}]"
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _text(html: str) -> str:
    """The page without styles and scripts, which are files; a mark of a legend by its hash."""
    for tag in ("style", "script"):
        html = re.sub(rf"(<{tag}[^>]*>).*?(</{tag}>)", r"\1..\2", html, flags=re.DOTALL)
    return rounded(
        re.sub(r'<svg width="30".*?</svg>', lambda mark: f"<svg {_digest(mark[0])}/>", html)
    )


def _parts(names: Sequence[str]) -> tuple[Part, ...]:
    return tuple(
        Part(f"page-{name}", f"page-{name}.txt", partial(page, name), cheap=name in CHEAP)
        for name in names
    )


PARTS = _parts(("parallel", "quick", "rl", "scaling", "seeds", "sync"))
