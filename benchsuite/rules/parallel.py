"""The rules on replicas that several ranks hold: stages, schedules, weights that are split.

A rule is silent where a number is not known. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable

from benchsuite.plan.cell import num_layers
from benchsuite.rules.view import Problem, Problems, View

PLACE = 40


def stages(view: View) -> Problems:
    """A pipeline stage holds at least one layer per chunk, and the schedule can be filled."""
    if not view.parallel.stages:
        return

    label = view.label("parallel")
    parts = view.cell.model_parallel
    schedule = str(view.option("parallel", "schedule") or "1f1b")
    micro = view.number("parallel", "num_micro_batches")
    stated = view.number("parallel", "num_chunks")
    several = view.parallel.several_chunks
    m = int(4 if micro is None else micro)
    chunks = int(stated or several.get(schedule, 1))
    if m < 1 or chunks < 1:
        yield Problem(
            "counts",
            f"num_micro_batches = {m}, num_chunks = {chunks} of {label}: at least 1 is needed",
            f"set options.{label}.num_micro_batches = 1 or more, num_chunks = 0 or more",
        )
        return

    if schedule in ("gpipe", "1f1b") and chunks > 1:
        yield Problem(
            "schedule",
            f"num_chunks = {chunks} with schedule = {schedule}: each stage is one run of layers",
            "set num_chunks = 1, or schedule = interleaved or zero_bubble",
        )

    if schedule == "1f1b" and m < parts:
        yield Problem(
            "schedule",
            f"num_micro_batches({m}) < stages({parts}) with schedule = 1f1b: the pipeline is never "
            "full",
            f"set num_micro_batches to {parts} or more, or schedule = gpipe",
        )

    rounds = max(1, m // max(1, parts))
    if schedule in ("interleaved", "zero_bubble") and m % rounds:
        yield Problem(
            "schedule",
            f"num_micro_batches({m}) is not divisible by rounds(max(1, {m} // stages({parts})) = "
            f"{rounds}), which "
            f"schedule = {schedule} needs",
            "set num_micro_batches to a multiple of the stages",
        )
    layers = num_layers(view.cell)
    if layers and layers < parts * chunks:
        yield Problem(
            "stages",
            f"layers({layers}) < stages({parts}) x num_chunks({chunks})",
            f"set model_parallel x num_chunks to at most {layers}",
        )
    trained = view.workload.trained_layers
    if trained and trained < parts:
        yield Problem(
            "stages",
            f"layers with parameters({trained}) < stages({parts})",
            f"set model_parallel to at most {trained}",
        )


def tensor(view: View) -> Problems:
    """What the workload splits by weight, its heads, channels or widths, divides by the parts."""
    parts = view.cell.model_parallel
    label = view.label("workload")
    if not view.parallel.splits_weights or parts < 2:
        return

    divides = view.workload.tensor_divides
    if not divides:
        yield Problem(
            "tensor plan",
            f"parallel = {view.label('parallel')} with workload = {label}: its class does not say "
            "what splits by weight",
            "give it tensor_plan and tensor_divides, or set parallel = pipeline or fsdp",
        )
        return

    named: list[str | int] = list(divides)
    if view.option("parallel", "sequence_parallel"):
        tokens = view.workload.tensor_tokens
        named += [tokens] if tokens else []
        if not tokens:
            yield Problem(
                "sequence parallel",
                f"sequence_parallel with workload = {label}: it has no sequences of tokens",
                "set sequence_parallel = false",
            )

    for what in named:
        value = view.number("workload", what) if isinstance(what, str) else what
        if value and value % parts:
            text = (
                f"{what}({value:g})"
                if isinstance(what, str)
                else f"the {value} that {label} splits by"
            )
            yield Problem(
                "tensor split",
                f"{text} is not divisible by model_parallel({parts})",
                "set model_parallel to a divisor"
                + (f", or {what} to a multiple" if isinstance(what, str) else ""),
            )


RULES: tuple[Callable[[View], Problems], ...] = (stages, tensor)
