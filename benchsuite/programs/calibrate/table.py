"""What `benchsuite calibrate` prints, in 100 columns: measured, fitted, predicted beside measured,
modelled."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchsuite.analysis.costs import LARGEST_ERROR
from benchsuite.measure.load import CONTENDED_ABOVE
from benchsuite.plan import plugins
from benchsuite.report import text

SHOWN_WORKERS = (2, 8, 64)  # of the modelled table; the document has them all
Row = Sequence[str]
Document = Mapping[str, Any]


def table(document: Document) -> str:
    """All sections with their headings."""
    sections = (
        _measured(document),
        _fitted(document),
        _predicted(document),
        _modelled(document),
        _caption(document),
    )
    return "\n\n".join("\n".join(section) for section in sections)


# -- sections --------------------------------------------------------------------------------------


def _measured(document: Document) -> Iterator[str]:
    workload = plugins.stem(document["workload"])  # a path would not fit the line
    yield f"measured, one value per fresh launch: {workload} {document['preset']}".rstrip()
    rows = [("", "median", "low .. high", "n", "")]

    for figure in document["quantities"]:
        spread = (
            f"{text.plain(figure['low'])} .. {text.plain(figure['high'])}"
            if figure["n"] > 1
            else ""
        )
        marks = ("*" if figure["contended"] else "") + (
            f" {figure['note']}" if figure["note"] else ""
        )
        rows.append(
            (
                figure["quantity"],
                f"{text.plain(figure['median'])} {figure['unit']}",
                spread,
                str(figure["n"]),
                marks,
            )
        )

    mark = "*" if (document["shaped"]["foreign_cpu_share"] or 0) > CONTENDED_ABOVE else ""

    for rate in document["shaped"]["rates"]:
        low = min(rate["delivered_mbit"])
        high = max(rate["delivered_mbit"])
        middle = f"{text.plain(statistics.median(rate['delivered_mbit']))} Mbit/s"
        said = f"payload of a {rate['mbit']:g} Mbit/s link (emulated)"
        rows.append(
            (
                said,
                middle,
                f"{text.plain(low)} .. {text.plain(high)}",
                str(len(rate["delivered_mbit"])),
                mark,
            )
        )

    yield from text.aligned(rows, right=(1, 2, 3), indent=2)
    if document["shaped"]["reason"]:
        yield f"  no link was shaped: {document['shaped']['reason']}"


def _fitted(document: Document) -> Iterator[str]:
    yield (
        "fitted: alpha + beta x bytes; error on left-out sizes (worst, median), rates and "
        "batches (worst)"
    )
    rows = []

    for name, said in (("one_way", "one message"), ("both_ways", "a message each way")):
        fitted = document["fits"][name]
        begin = document["fits"][name]["low_bytes"]
        worst = f"{_percent(fitted['worst_size_error'])} at {_bytes(fitted['worst_left_out_size'])}"
        worst += f", {_percent(fitted['median_size_error'])}"

        for number, segment in enumerate(fitted["segments"]):
            end = segment["high_bytes"] or fitted["high_bytes"]
            beta = segment["beta_s_per_byte"]
            rate = f"{8e-9 / beta:.1f} Gbit/s" if beta else "-"
            sizes = f"{_bytes(begin)} to {_bytes(end)}"
            rows.append(
                (
                    said,
                    sizes,
                    f"{1e6 * segment['alpha_s']:.1f} us",
                    rate,
                    f"error {worst}" if not number else "",
                )
            )
            begin = end
            said = ""

    shaped = document["shaped"]
    compute = document["fits"]["compute"]

    if shaped["rates"]:
        share = f"{shaped['payload_share']:.3f} of the rate"
        rows.append(
            (
                "a shaped link's payload",
                "",
                "",
                share,
                f"error {_percent(shaped['worst_rate_error'])}",
            )
        )

    if compute["per_sample_s"] is not None:
        each = f"{1e6 * compute['per_sample_s']:.1f} us a sample"
        error = f"error {_percent(compute['worst_batch_error'])}"
        rows.append(("a gradient", "", f"{1e6 * compute['overhead_s']:.0f} us", each, error))

    yield from text.aligned(rows, right=(2, 3), indent=2)


def _predicted(document: Document) -> Iterator[str]:
    yield "median step time: predicted under the virtual clock, beside the measured one"
    rows = [("", "virtual", "wall", "low .. high", "n", "difference")]

    for pair in document["predictions"]:
        measured = pair["measured_step_s"]
        predicted = pair["predicted_virtual_step_s"]
        low_high = f"{_ms(min(measured))} .. {_ms(max(measured))}" if len(measured) > 1 else ""
        wall = f"{_ms(statistics.median(measured))} ms" if measured else "-"
        virtual = "-" if predicted is None else f"{_ms(predicted)} ms"
        difference = "-" if pair["difference"] is None else f"{100 * pair['difference']:+.0f} %"
        flags = ", ".join(pair["measured_flags"])
        failed = next(
            iter([pair["reason"], pair["predicted_failure"], *pair["measured_failures"]]), None
        )
        said = " ".join(word for word in (difference, flags, failed) if word)
        rows.append(
            (pair["label"].partition(" ")[2], virtual, wall, low_high, str(len(measured)), said)
        )

    yield from text.aligned(rows, right=(1, 2, 3, 4), indent=2)


def _modelled(document: Document) -> Iterator[str]:
    if all(row["error"] is None for row in document["modelled"]):
        yield (
            "modelled: nothing, since no two rates were tried: the error of a time at another "
            "rate is not known"
        )
        return

    yield (
        "modelled: one mean on equal full-duplex ports, value [interval]; worst error on "
        "left-out sizes/rates"
    )
    workers = [
        n for n in SHOWN_WORKERS if any(row["num_workers"] == n for row in document["modelled"])
    ]
    blocks: dict[tuple[float, float], dict[str, dict[int, Document]]] = {}

    for row in document["modelled"]:
        block = blocks.setdefault((row["link_mbit"], row["num_bytes"]), {})
        block.setdefault(row["operation"], {})[row["num_workers"]] = row

    rows: list[Row] = []

    for (mbit, num_bytes), operations in blocks.items():
        size = f"{num_bytes / 1e6:g} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:g} kB"
        rows.append((f"{size}, {mbit / 1000:g} Gbit/s", *(f"N = {n}" for n in workers), "left out"))
        rows += [
            (
                f" {name}",
                *(_extrapolated(row[n]) for n in workers),
                _worst([row[n] for n in workers]),
            )
            for name, row in operations.items()
        ]

    yield from text.aligned(rows, right=(), indent=2)


def _worst(row: Sequence[Document]) -> str:
    """The largest errors in a row, those on sizes and those on rates."""
    errors = [
        [cell[name] for cell in row if cell[name] is not None]
        for name in ("size_error", "rate_error")
    ]
    sizes, rates = (f"{100 * max(each):.0f}" if each else "?" for each in errors)
    return f"{sizes}/{rates} %"


def _extrapolated(row: Document) -> str:
    """A number with its interval and errors, or the reason why there is none."""
    if row["error"] is None:
        return "- not tried"
    if row["shown_s"] is None:
        return f"- error {_percent(row['error'])} > {_percent(LARGEST_ERROR)}"
    scale, unit = (1.0, "s") if row["shown_s"] >= 1 else (1e3, "ms")
    value, low, high = (
        text.plain(scale * row[name], decimals=2) for name in ("shown_s", "low_s", "high_s")
    )
    return f"{value} {unit} [{low} {high}]"


def _caption(document: Document) -> Iterator[str]:
    share = document["foreign_cpu_share"]
    load = "an unknown share" if share is None else text.percent(share)
    yield (
        "low .. high: range over launches (5 or more: 95 % interval). Loopback rates are no "
        "network's."
    )
    yield (
        f"Others used {load} of the {document['cores']} cores; * = over "
        f"{text.percent(CONTENDED_ABOVE)} in a launch."
    )
    yield (
        "Step times: a rest of the step that the virtual clock does not know is added to its "
        "gradients."
    )
    yield (
        "Modelled: alpha is this machine's own, a network adds its latency; how times grow with "
        "N is theory."
    )
    yield document["path"]


# -- text ------------------------------------------------------------------------------------------


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def _percent(share: float | None) -> str:
    return "unknown" if share is None else text.percent(share)


def _bytes(value: float | None) -> str:
    if value is None:
        return "-"

    for unit, scale in (("MiB", 2**20), ("KiB", 2**10)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"

    return f"{value:.0f} B"
