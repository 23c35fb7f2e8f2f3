"""The page: one file, nothing fetched, the same bytes twice, and nothing missing without a word."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest

from benchsuite import rules
from benchsuite.analysis.select import select
from benchsuite.errors import UsageError
from benchsuite.plan.plan import Plan, Refused
from benchsuite.report import page, spec
from benchsuite.report.drawing.style import looks
from benchsuite.report.material import Material
from benchsuite.report.tables import table as all_numbers
from benchsuite.report.text import quantity, si
from benchsuite.report.words.answer import answer
from benchsuite.report.words.limits import HEADINGS, limits
from benchsuite.results.record import Run
from benchsuite.results.store import Store
from benchsuite.rules import Problem
from tests import synthetic_runs as made

GOLDEN = Path(__file__).parent / "golden"
QUICK = Path(__file__).parents[1] / "reports" / "quick.toml"
ENVIRONMENTS = {made.ENVIRONMENT_ID: made.ENVIRONMENT}


def _plan(**changes: object) -> Plan:
    text = QUICK.read_text(encoding="utf-8")
    document = tomllib.loads(text)
    ring = dataclasses.replace(made.quick_cells()[3], topology="ring", servers=0)
    problem = Problem(
        "sync x topology", "a ring is a collective", "use topology = parameter_server"
    )
    plan = Plan(
        name="quick",
        path=None,
        question=document["question"],
        seeds=(0, 1, 2),
        cells=tuple(made.quick_cells()),
        refused=(Refused(ring, (problem,)),),
        num_excluded=0,
        figures=tuple(document["figures"]),
        text=text,
    )
    return dataclasses.replace(plan, **changes)


def _material(runs: list[Run] | None = None) -> Material:
    cells = made.quick_cells()
    return Material(
        cells,
        (0, 1, 2),
        select(cells, (0, 1, 2), made.quick_runs() if runs is None else runs),
        [made.ENVIRONMENT],
    )


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page")
    page.render(_plan(), made.quick_runs(), out, environments=ENVIRONMENTS)
    return out


@pytest.fixture(scope="module")
def html(built: Path) -> str:
    return (built / "index.html").read_text(encoding="utf-8")


class _Reader(HTMLParser):
    """Addresses a browser would fetch, captions, visible text, and tags that were not closed in
    order."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.captions: list[str] = []
        self.text: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.figures = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if values.get("id"):
            self.ids.append(str(values["id"]))
        for key in ("src", "href", "xlink:href", "srcset", "data"):
            if key in values and tag != "a" and not str(values[key]).startswith(("#", "data:")):
                self.fetched.append(f"<{tag} {key}={values[key]}>")
        self.figures += tag == "figure"
        if tag == "figcaption":
            self.captions.append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "figcaption" in self.open:
            self.captions[-1] += data
        if not {"script", "style"} & set(self.open):
            self.text.append(data)


@pytest.fixture(scope="module")
def read(html: str) -> _Reader:
    reader = _Reader()
    reader.feed(html)
    return reader


def test_rendered_twice_every_file_has_the_same_bytes(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page.render(_plan(), list(reversed(made.quick_runs())), tmp_path, environments=ENVIRONMENTS)
    assert _digests(tmp_path) == _digests(built)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    page.render(_plan(), made.quick_runs(), tmp_path, environments=ENVIRONMENTS)
    changed = {
        name for name, digest in _digests(tmp_path).items() if digest != _digests(built)[name]
    }
    assert {Path(name).suffix for name in changed} == {".pdf", ".json"}, (
        "the date stands in PDFs and the manifest only"
    )


def test_the_page_fetches_nothing(html: str, read: _Reader) -> None:
    assert read.fetched == []
    outside = re.sub(r'xmlns(:\w+)?="[^"]*"', "", html)
    assert not re.findall(r"https?://", outside), "no address of any server"
    assert (
        not re.findall(r"url\((?!#)[^)]*\)", outside)
        and "@import" not in html
        and "@font-face" not in html
    )
    assert "<title>Which synchronisation, at what cost? · benchsuite quick</title>" in html


def test_tags_are_closed_in_order_and_ids_are_unique(read: _Reader) -> None:
    assert read.open == []
    twice = {each for each in read.ids if read.ids.count(each) > 1}
    assert not twice, f"{sorted(twice)[:5]}"


def test_every_reference_inside_the_page_has_its_target(html: str, read: _Reader) -> None:
    wanted = set(re.findall(r'href="#([^"]+)"', html)) | set(re.findall(r"url\(#([^)]+)\)", html))
    assert wanted and wanted <= set(read.ids)


def test_every_caption_says_n_machine_and_commit(read: _Reader) -> None:
    assert read.figures == len(read.captions) == 8
    for caption in read.captions:
        assert (
            re.search(r"n = \d", caption)
            and made.MACHINE in caption
            and "commit 0123456789" in caption
        ), caption
        assert "preview" in caption  # three seeds


def test_all_five_status_words_and_their_reasons_are_on_the_page(read: _Reader) -> None:
    text = " ".join(" ".join(read.text).split())
    assert "51 runs asked for: 47 ok, 1 failed, 1 timeout, 1 unsupported, 1 not run" in text
    for reason in (
        "killed by signal 9 in step 17",
        "no sign of life for 60 s",
        "no gloo in this torch",
    ):
        assert reason in text
    assert (
        "a ring is a collective: use topology = parameter_server" in text
    )  # refused, with its remedy
    assert (
        "Diverged: cnn/digits asynchronous parameter_server N=4, seed 2 at step 100; a miss" in text
    )


def test_misses_are_printed_with_how_many_of_how_many(read: _Reader) -> None:
    assert "> budget (3 of 3)" in " ".join(" ".join(read.text).split())


def test_what_the_numbers_do_not_say_follows_from_the_runs(read: _Reader) -> None:
    text = " ".join(" ".join(read.text).split())
    for said in (
        "2 cores of this machine",
        "bbr",
        "bound by the CPU",
        "preview",
        "not an update",
        "contended",
    ):
        assert said in text, said
    alone = [run for run in made.quick_runs() if "oversubscribed" not in run.flags]
    assert not any("wall time" in what for what, _ in limits(_material(alone)))


def test_what_the_rules_notice_of_a_cell_with_runs_stands_on_the_page(tmp_path: Path) -> None:
    heading, said = (
        "They are not equal to one process.",
        "bfloat16 rounds to 2^-8: set precision = fp64",
    )
    rounded = tuple(dataclasses.replace(cell, precision="bf16") for cell in made.quick_cells())
    runs = [made.make_run(cell, seed) for cell in rounded for seed in (0, 1, 2)]
    text = page.render(_plan(cells=rounded), runs, tmp_path, environments=ENVIRONMENTS).read_text(
        encoding="utf-8"
    )
    assert text.count(heading) == 1 and said in text
    without_runs = page.render(_plan(cells=rounded), [], tmp_path).read_text(encoding="utf-8")
    assert heading not in without_runs
    assert heading not in [what for what, _ in limits(_material())]


def test_every_notice_has_its_heading_on_the_page() -> None:
    source = inspect.getsource(rules.notices) + inspect.getsource(rules._unequal)
    named = set(re.findall(r'Problem\(\s*"([^"]+)"', source))
    assert named == set(HEADINGS)


def test_oversubscribed_points_are_hollow_and_joined_to_nothing(built: Path) -> None:
    svg = (built / "figures" / "throughput.svg").read_text(encoding="utf-8")
    assert svg.count('id="hollow"') == 2 * 8 and svg.count('id="filled"') == 2 * 7
    # 5 strategies, lines only where both ends are clean: ring and ddp from 1 to 2, in two panels
    from matplotlib import rc_context

    from benchsuite.report import kinds
    from benchsuite.report.drawing import style

    entry = next(each for each in spec.parse(_plan().figures) if each.kind == "throughput")
    with rc_context(style.theme()):
        drawing = kinds.load("throughput")(entry, _material())[0]
    joined = [
        line for ax in drawing.figure.axes for line in ax.lines if len(set(line.get_xdata())) > 1
    ]
    assert len(joined) == 4 and all(max(line.get_xdata()) < 1.5 for line in joined)


def test_the_answer_is_made_from_the_data() -> None:
    said = {sentence.topic: sentence.text for sentence in answer(_material())}
    assert "2 workers and a core for every rank" in said["Throughput"]
    assert (
        "With 4 workers ranks share cores, and their times are not compared" in said["Throughput"]
    )
    assert "asynchronous missed 97.5 % test accuracy: > budget (3 of 3)" in said["Convergence"]
    assert "equal in every digit with 2 workers" in said["Same training"]
    assert "payload equals its prediction exactly" in said["Bytes"]
    slow = said["A slow worker"]
    assert "blocked 77%" in slow and "n = 3" in slow and " times " not in slow
    assert slow.endswith("more ranks than cores: observed, not a ranking.")
    for topic, text in said.items():
        assert topic in ("Bytes", "Same training") or "n = " in text, text


@pytest.mark.parametrize(
    ("flags", "faster", "ending"),
    [
        ((), 10.0, r": [\d.,]+ \[[\d.,–]+\] times as many\."),
        ((), 1.0, r"; no difference seen \(the ranges touch\)\."),
        (("contended",), 10.0, "; contended by other processes: observed, not a ranking\\."),
    ],
)
def test_a_factor_needs_rows_without_a_flag_and_ranges_apart(
    flags: tuple[str, ...], faster: float, ending: str
) -> None:
    runs = []
    for run in made.quick_runs():
        if run.cell.straggler:
            rate = (100.0 + run.cell.seed) * (faster if run.cell.sync == "asynchronous" else 1.0)
            run = dataclasses.replace(run, flags=flags, cost={**run.cost, "samples_per_s": rate})
        runs.append(run)
    said = {sentence.topic: sentence.text for sentence in answer(_material(runs))}
    assert re.search(r"samples/s, .* \(n = 3\)" + ending + "$", said["A slow worker"]), said[
        "A slow worker"
    ]


def test_a_broken_law_is_shouted() -> None:
    runs = []
    for run in made.quick_runs():
        if run.cell.topology == "ring" and run.result:
            run = dataclasses.replace(
                run, result={**run.result, "payload_bytes": run.result["payload_bytes"] + 1}
            )
        runs.append(run)
    said = {sentence.topic: sentence.text for sentence in answer(_material(runs))}
    assert "payload DIFFERS from its prediction for synchronous ring" in said["Bytes"]


def test_a_page_without_runs_says_how_to_make_them(tmp_path: Path) -> None:
    path = page.render(_plan(), [], tmp_path)
    text = path.read_text(encoding="utf-8")
    assert "benchsuite run quick" in text and "51 not run" in text


def test_a_page_of_one_lonely_run_is_drawn(tmp_path: Path) -> None:
    run = made.make_run(
        made.quick_cells()[1], 0
    )  # one ring worker: no bytes, no comparison, no staleness
    text = page.render(_plan(), [run], tmp_path).read_text(encoding="utf-8")
    assert "50 not run" in text and "unknown commit" in text


def test_a_page_without_a_target_is_drawn(tmp_path: Path) -> None:
    runs = []
    for run in made.quick_runs((0,)):
        if run.result:
            none = dict.fromkeys(("easy", "target", "hard"))
            result = {**run.result, "target": None, "samples_to": none}
            run = dataclasses.replace(
                run, result=result, cost={**run.cost, "time_to": none, "bytes_to": none}
            )
        runs.append(run)
    text = page.render(_plan(seeds=(0,)), runs, tmp_path).read_text(encoding="utf-8")
    assert "budget (" not in re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL).replace(
        "budget (k of n)", ""
    )


def test_an_old_figure_does_not_stay_beside_new_ones(tmp_path: Path) -> None:
    plan = _plan(figures=({"kind": "traffic", "name": "old"}, {"kind": "table"}))
    page.render(plan, made.quick_runs((0,)), tmp_path, environments=ENVIRONMENTS)
    (tmp_path / "mine.txt").write_text("keep")
    page.render(
        _plan(figures=({"kind": "traffic", "name": "new"},)), made.quick_runs((0,)), tmp_path
    )
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == [
        "new.pdf",
        "new.png",
        "new.svg",
    ]
    assert not list((tmp_path / "tables").iterdir()) and (tmp_path / "mine.txt").exists()


def test_the_manifest_names_inputs_code_and_outputs(built: Path) -> None:
    manifest = json.loads((built / "MANIFEST.json").read_text(encoding="utf-8"))
    assert len(manifest["runs"]) == 47 and "benchsuite/report/page.py" in manifest["code"]
    written = _digests(built)
    written.pop("MANIFEST.json")
    assert manifest["outputs"] == written
    assert {Path(name).suffix for name in written} == {
        ".html",
        ".pdf",
        ".svg",
        ".png",
        ".tex",
        ".csv",
        ".md",
    }


def test_the_page_from_a_results_folder_is_the_same(built: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "results")
    identity = store.write_environment(made.MACHINE, made.ENVIRONMENT)
    for run in made.quick_runs():
        store.write(dataclasses.replace(run, environment_id=identity))
    path = page.render_stored(_plan(), store, tmp_path / "out")
    assert path.read_bytes() == (built / "index.html").read_bytes()
    stale = page.render_stored(_plan(), store, tmp_path / "stale", code_id=lambda cell: "newer")
    text = stale.read_text(encoding="utf-8")
    assert "50 stale runs" in text and "51 not run" in text


def test_the_printed_table_is_the_golden_one(built: Path) -> None:
    found = (built / "tables" / "table.md").read_text(encoding="utf-8")
    assert found == (GOLDEN / "report_table.md").read_text(encoding="utf-8")


def test_tex_is_a_booktabs_table_with_nothing_unescaped(built: Path) -> None:
    tex = (built / "tables" / "table.tex").read_text(encoding="utf-8")
    assert r"\toprule" in tex and r"\bfseries" in tex and tex.isascii()
    assert not re.search(
        r"(?<!\\)[%#_$](?!\\geq|\\leq|$)", tex.replace(r"$\geq$", "").replace(r"$\leq$", "")
    )


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"kind": "trafic"}, "did you mean 'traffic'"),
        ({}, "unknown figure kind"),
        ({"kind": "traffic", "x": ["samples"]}, "unknown key 'x' of figure traffic"),
        ({"kind": "metric_against", "x": "second"}, "did you mean 'seconds'"),
        ({"kind": "table", "where": {"replica": 2}}, "did you mean 'replicas'"),
        ({"kind": "table", "name": "../x"}, "becomes a file name"),
    ],
)
def test_an_unknown_figure_entry_is_refused_with_the_nearest_known_one(
    entry: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        spec.parse([entry])


def test_figure_names_are_unique_and_filters_filter() -> None:
    first, second = spec.parse(
        [{"kind": "traffic"}, {"kind": "traffic", "where": {"straggler": True, "replicas": 2}}]
    )
    assert (first.name, second.name) == ("traffic", "traffic_2")
    with pytest.raises(UsageError, match="two figures are named"):
        spec.parse([{"kind": "traffic"}, {"kind": "traffic", "name": "traffic"}])
    assert sum(second.wants(cell) for cell in made.quick_cells()) == 2


def test_a_strategy_looks_the_same_in_every_plan_and_new_ones_get_their_own_colour() -> None:
    few = looks(["synchronous/ring", "synchronous/tree"])
    many = looks(
        [
            "synchronous/ring",
            "ddp/native",
            "synchronous/native",
            "gossip/exponential",
            "synchronous/tree",
        ]
    )
    assert few["synchronous/ring"] == many["synchronous/ring"]
    assert len({look.color for look in many.values()}) == len(many)


def test_numbers_carry_as_many_digits_as_their_interval_bears() -> None:
    summary = all_numbers.summarize
    assert quantity(summary([5123.4, 4900.0, 5300.0])) == "5,120 [4,900–5,300]"
    assert quantity(summary([0.41237, 0.41241, 0.4125])) == "0.41241 [0.41237–0.41250]"
    assert quantity(summary([7.0, 7.0, 7.0])) == "7"
    assert quantity(summary([3.0, float("inf"), 4.0])) == "4.0 [3.0–> budget (1 of 3)]"
    assert quantity(summary([float("inf")] * 2 + [4.0])) == "> budget (2 of 3)"
    assert quantity(summary([])) == "–"
    assert si(101_480) == "101 kB" and si(999_999) == "1 MB" and si(0) == "0 B"


def test_letters_of_a_narrow_drawing_are_as_large_as_of_a_wide_one(html: str) -> None:
    """A picture fills the page up to its natural width: 952 px for 7 inches."""
    shown = re.findall(r'class="whole" style="max-width:(\d+)px" viewBox="\S+ \S+ (\S+) \S+"', html)
    assert len(shown) == html.count('class="whole"') > 3
    scales = [int(pixels) / float(points) for pixels, points in shown]
    assert max(scales) - min(scales) < 0.01, (
        f"pixels per point from {min(scales):.3f} to {max(scales):.3f}"
    )
    assert scales[0] == pytest.approx(952 / (7 * 72), rel=0.01)
