"""What the numbers of a page do not say, and what each quantity means.

Only what applies to the runs of the page is printed.
"""

from __future__ import annotations

from collections.abc import Iterable

from benchsuite import rules
from benchsuite.report import text
from benchsuite.report.material import Material

DEFINITIONS = (
    (
        "throughput",
        "total samples over total wall time of the window after warm-up, summed over workers; "
        "never a mean of rates",
    ),
    (
        "step, update",
        "a synchronous step uses one global batch; an asynchronous update uses 1/N of one",
    ),
    (
        "payload",
        "bytes of every send of our own topologies (counted), or for library collectives the calls "
        "seen on one untimed step times the algorithm's factor (derived)",
    ),
    (
        "predicted",
        "from the cell, the parameter shapes and recorded events only; must equal a counted "
        "payload exactly",
    ),
    (
        "wire",
        "the kernel's counters of the run's private interface, transmit side, an idle reading "
        "subtracted; headers included",
    ),
    ("busiest port", "the most payload that one rank sends, or receives"),
    (
        "CPU per sample",
        "user and system time of all ranks of the run, servers and spinning included, over samples",
    ),
    ("staleness", "version at the update minus the version the gradient was computed with"),
    ("blocked", "time a rank waits inside a communication call"),
    (
        "to target",
        "at the first evaluation that meets the target, not interpolated; evaluation itself is off "
        "the clock",
    ),
    ("> budget (k of n)", "k of n runs did not arrive: infinite, and kept in the median"),
    ("front", "the strategies that no other beats on both quantities by their medians (means)"),
    (
        "tuned",
        "the learning rate that trials chose for the strategy: the same factors of the recipe's, "
        "each tried once with a seed of its own, the fewest samples to the target won",
    ),
    (
        "virtual second",
        "second of the simulated clock; virtual and wall seconds never share a column or an axis",
    ),
    ("waiting", "share of the workers' virtual time in which they compute nothing"),
    (
        "parameters per rank",
        "elements of the fullest rank's vector: of a pipeline its layers, of tensor parallelism "
        "its slices and what stands on every part, of fsdp its shards without padding",
    ),
    (
        "memory per rank",
        "highest resident set while the model is built and trained, minus what was resident "
        "before: parameters, gradients, optimiser, activations, buffers, and code that is touched "
        "for the first time; of the fullest rank",
    ),
    (
        "inside, between",
        "payload from part to part of one replica, and from replica to replica (servers included)",
    ),
    (
        "bubble",
        "share of a pipeline's slots in which a stage idles; a slot is a forward pass, or half a "
        "backward pass, of one micro-batch through one chunk, and transfers take no time",
    ),
    (
        "balance",
        "work of all stages (FLOPs, or parameters where a workload states none) over stages x the "
        "largest one: no schedule uses more of the stages' time",
    ),
    ("prefixes", "k, M, G are powers of 1000; a MiB is 1,048,576 bytes"),
)
STATUS_WORDS = (
    ("ok", "ran to its budget"),
    ("failed", "a rank ended early or raised"),
    ("timeout", "the deadline passed"),
    ("unsupported", "the combination or the machine cannot do it"),
    ("not run", "nothing is stored"),
)

HEADINGS = {  # by the rule of a notice
    "batch norm": "They do not compare with one large batch.",
    "laws": "They are not equal to one process.",
}


def limits(material: Material) -> list[tuple[str, str]]:
    """Pairs (what, why) of everything that a reader could take these numbers for and must not."""
    virtual = [*_noticed(material), *_virtual(material)]
    if not material.runs:
        return [*virtual, *_preview(material.in_virtual_time)]
    said = [*_crowding(material)]

    if all(run.cell.hosts == 1 for run in material.runs):
        said.append(
            (
                "They do not rank networks.",
                "One host, loopback: every topology shares one memory bus"
                + _congestion(material)
                + " Bytes are exact all the same.",
            )
        )
        said.append(
            (
                "Blocked is not network time.",
                "On loopback a rank that is blocked waits for the other ranks' computation and for "
                "the scheduler: it is bound by the CPU.",
            )
        )

    said += _preview(material)

    if material.names["strategy"].str.startswith("asynchronous").any():
        said.append(
            (
                "A step is not an update.",
                "Compare asynchronous rows per sample, not per step: an update uses 1/N of a "
                "global batch.",
            )
        )

    if "derived" in set(material.frame["payload_source"].dropna()):
        said.append(
            (
                "Derived bytes prove nothing by themselves.",
                "Payload of library collectives is a formula; only the wire column checks it.",
            )
        )

    return [*said, *virtual]


def _noticed(material: Material) -> Iterable[tuple[str, str]]:
    """What the rules notice about cells that have a run."""
    with_runs = {run.cell_id for run in material.selection.runs}
    for notice in rules.noticed(cell for cell in material.cells if cell.id in with_runs):
        yield HEADINGS[notice.problem.rule], f"{notice.text}."


def _preview(material: Material) -> list[tuple[str, str]]:
    n = max(
        (
            sum(run.cell_id == cell_id for run in material.runs)
            for cell_id in material.names["cell_id"]
        ),
        default=0,
    )
    if not 0 < n < 5:
        return []
    return [
        (
            "They are a preview.",
            f"n = {n} seeds per cell at most. The spread printed is the range of the runs, not a "
            "confidence interval; a published convergence figure has at least 5 seeds, and no rank "
            "test can tell 3 from 3 apart (p ≥ 0.10).",
        )
    ]


def _virtual(material: Material) -> list[tuple[str, str]]:
    """What virtual seconds are not."""
    if not material.in_virtual_time.runs:
        return []
    return [
        (
            "Virtual seconds are not wall seconds.",
            "Gradients and updates are real, clock and network are simulated: compute times from a "
            "distribution, a full-duplex port per rank, no switch, no lost packet, no operating "
            "system. They say what waiting and staleness do to training, not how fast a cluster "
            "is; they repeat exactly on any machine.",
        )
    ]


def _crowding(material: Material) -> Iterable[tuple[str, str]]:
    table = material.scaling
    crowded = table[table["oversubscribed"]]
    cores = sorted({int(run.cost["cores"]) for run in material.runs if run.cost.get("cores")})

    if len(crowded):
        machine = f"{cores[0]} cores" if len(cores) == 1 else "too few cores"
        sizes = text.count_of(len(crowded), "cell")
        shown = (
            "no rate" if any(cell.model_parallel > 1 for cell in material.cells) else "hollow marks"
        )
        yield (
            "They rank no wall time beyond the cores.",
            f"{sizes} of {len(table)} ran more ranks (workers + servers) than the {machine} of "
            f"this machine: {shown}. Their samples/s and seconds say how long it took here, not "
            "which strategy is faster. CPU time, bytes, updates and staleness are counted and stay "
            "valid.",
        )

    contended = int(table["num_contended"].sum())

    if contended:
        yield (
            "Some runs shared the machine.",
            f"{text.count_of(contended, 'run')} had more than 5 % foreign CPU load (contended): "
            "hollow as well.",
        )


def _congestion(material: Material) -> str:
    """Names TCP's congestion control, which changes loopback by a factor of 2."""
    names = sorted(
        {
            str(value)
            for environment in material.environments
            for key, value in environment.items()
            if "congestion" in key and isinstance(value, str)
        }
    )
    if not names:
        return " (TCP congestion control not recorded)."
    return (
        f", and TCP congestion control alone ({', '.join(names)} here) moves loopback by a "
        "factor of 2."
    )
