"""`make gpu-check`: measures in minutes what a machine with one CUDA device does.

It installs nothing. It runs from the repository's root under any Python with torch (>= 2.8) and
numpy, and needs nothing else outside the standard library. It has four parts: the gpu presets as
ordinary cells (tokens, images and frames per second, peak memory, share of a measured matrix
product); ranks that share the device through gloo; ResNet-50 in alternation with a hand-written
loop; and laws on the device.

One JSON file comes out, with the machine, the version of torch and the commit. The exit code is 0
where every check passed, 1 where one did not, and 2 where there is no device. `--cpu-dry-run` does
the same on the CPU with tiny presets: its figures mean nothing, and bounds on speed are not
checked.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchsuite.laws import Figure
from benchsuite.laws.harness.cases import tiny
from benchsuite.laws.harness.ranks import thread_ranks
from benchsuite.laws.micro_batches import accumulated
from benchsuite.laws.part import bf16_is_close
from benchsuite.laws.synchronous import equals_one_process
from benchsuite.measure import environment
from benchsuite.plan import plugins
from benchsuite.plan.cell import Budget, Cell, resolve
from benchsuite.programs.gpu.loops import Rates, compared, rounded
from benchsuite.results.record import Run, Status, now_iso
from benchsuite.results.store import GPU_CHECKS, Store
from benchsuite.running import api
from benchsuite.worker import devices

OK = 0
FAILED = 1
NO_DEVICE = 2
# The least share of the matrix product's rate for gpt2-small in bf16, and the least ratio of
# ResNet-50's rate to that of a hand-written loop.
LEAST_MFU = 0.40
LEAST_RATIO = 0.98
UNITS = {"transformer": "tokens/s", "cnn": "images/s", "rl_agent": "frames/s"}
DEADLINE_S = 240.0
# Workload, preset and precision of the cells that have the device to themselves.
ALONE = (
    ("transformer", "gpu", "bf16"),
    ("transformer", "gpu_medium", "bf16"),
    ("cnn", "gpu", "bf16"),
    ("rl_agent", "comm", "fp32"),
)
KEPT = (
    "samples_per_s",
    "samples_per_s_low",
    "samples_per_s_high",
    "env_steps_per_s",
    "step_time_s_median",
    "warmup_steps",
    "mfu",
    "flop_per_s",
    "flops_per_sample",
    "matmul_ceiling_flop_per_s",
    "peak_device_bytes",
    "device_name",
    "peak_device_reserved_bytes",
    "peak_memory_bytes",
    "peak_model_bytes",
)
SHARED = ("native", "ring", "parameter_server")  # two ranks on one device
LAWS: tuple[dict[str, Any], ...] = (
    *(
        {"topology": topology, "replicas": n}
        for topology in (*SHARED, "direct", "tree")
        for n in (1, 2)
    ),
    {"replicas": 2, "topology": "ring", "options": {"synchronous": {"bucket_mib": 0.001}}},
    *({"replicas": n, "options": {"data": {"num_micro_batches": 4}}} for n in (1, 2)),
)


@dataclass(frozen=True)
class Check:
    """One line of the report: what was asked, whether it holds, and both numbers."""

    name: str
    holds: bool
    detail: str


@dataclass
class Found:
    """Everything that the file is made of."""

    runs: list[dict[str, Any]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)  # checks that have no file or preset here
    rates: dict[str, Any] = field(default_factory=dict)

    def check(self, name: str, holds: bool, detail: str) -> None:
        """Notes one check and prints it."""
        self.checks.append(Check(name, holds, detail))
        print(f"{'pass' if holds else 'FAIL'}  {name}: {detail}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all parts and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchsuite.gpu_check", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--out", default=f"results/{GPU_CHECKS}", metavar="DIR", help="where the JSON file goes"
    )
    parser.add_argument(
        "--cpu-dry-run", action="store_true", help="the same way on the CPU, with tiny presets"
    )
    args = parser.parse_args(arguments)

    if not args.cpu_dry_run and not torch.cuda.is_available():
        print(
            f"no GPU check: torch {torch.__version__} sees no CUDA device here (--cpu-dry-run goes "
            "without)"
        )
        return NO_DEVICE

    torch.set_num_threads(1)
    device = "cpu" if args.cpu_dry_run else "cuda"
    devices.choose(Cell(device=device), local_rank=0)
    found = Found()
    started_at = now_iso()

    for part in (presets, shared, hand_written, laws):
        try:
            part(found, device)
        except Exception as error:  # noqa: BLE001  one part that breaks must not cost the others' figures
            traceback.print_exc()
            found.check(part.__name__, False, f"{type(error).__name__}: {error}")

    passed = bool(found.checks) and all(check.holds for check in found.checks)
    path = write(Path(args.out), found, started_at=started_at, device=device, passed=passed)
    print(f"{'passed' if passed else 'failed'}: {path}")
    return OK if passed else FAILED


def write(folder: Path, found: Found, *, started_at: str, device: str, passed: bool) -> Path:
    """Writes the result file."""
    folder.mkdir(parents=True, exist_ok=True)
    commit, dirty = environment.code_version()
    name = torch.cuda.get_device_name() if device == "cuda" else "none (dry run)"
    document = {
        "check": "gpu",
        "started_at": started_at,
        "machine": environment.machine(),
        "device": name,
        "dry_run": device == "cpu",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "commit": commit,
        "dirty": dirty,
        "passed": passed,
        **asdict(found),
    }
    path = folder / f"gpu-check-{started_at.replace(':', '').replace('-', '')}.json"
    path.write_text(
        json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8"
    )
    return path


# -- cells -----------------------------------------------------------------------------------------


def presets(found: Found, device: str) -> None:
    """Measures the gpu presets, each alone on the device."""
    wanted = []

    for workload, preset, precision in ALONE:
        known = plugins.find("workload", workload).presets

        if preset not in known:
            found.absent.append(f"{workload}/{preset}")
            continue

        small = device == "cpu"
        wanted.append(
            Cell(
                workload=workload,
                preset="smoke"
                if small and workload != "cnn"
                else "comm"
                if small
                else preset,  # digits need sklearn
                precision=precision,
                device=device,
                budget=Budget(steps=8 if small else None, timeout_s=DEADLINE_S),
            )
        )

    for run in launched(wanted):
        row = summary(run)
        found.runs.append(row)
        found.check(run.cell.label, run.status == Status.OK, run.reason or shown(row))

        if (run.cell.workload, run.cell.preset) == ("transformer", "gpu"):
            share = row["mfu"] or 0.0
            found.check(
                "gpt2-small, share of the ceiling",
                share >= LEAST_MFU,
                f"{share:.3f}, at least {LEAST_MFU}",
            )


def shared(found: Found, device: str) -> None:
    """Runs two ranks on one device, through gloo and over several topologies.

    Every byte that they send must be as predicted.
    """
    cells_ = [
        Cell(
            workload="transformer",
            preset="smoke",
            topology=topology,
            replicas=2,
            device=device,
            budget=Budget(steps=8, timeout_s=DEADLINE_S),
        )
        for topology in SHARED
    ]

    for run in launched(cells_):
        row = summary(run)
        found.runs.append(row)
        same = (
            run.status == Status.OK and run.result["predicted_bytes"] == run.result["payload_bytes"]
        )
        found.check(f"{run.cell.label}, one device", same, run.reason or shown(row))


def launched(wanted: Sequence[Cell]) -> Iterator[Run]:
    """Runs cells as ordinary launches, each in fresh processes, and reads their run files back."""
    with tempfile.TemporaryDirectory(prefix="benchsuite-gpu-") as folder:
        api.run(list(wanted), results=folder)
        runs = {run.cell_id: run for run in Store(folder).runs()}

    for cell in {resolve(cell).id: cell for cell in wanted}:
        yield runs[cell]


def summary(run: Run) -> dict[str, Any]:
    """The figures of a run that the file keeps."""
    rate = run.cost.get("env_steps_per_s") or run.cost.get("samples_per_s")
    unit = UNITS.get(run.cell.workload, "")
    if unit == "tokens/s" and rate:
        rate *= run.cell.options["transformer"]["context"]
    return {
        "cell": run.cell.to_json(),
        "label": run.cell.label,
        "status": str(run.status),
        "reason": run.reason,
        "rate": rate,
        "unit": unit,
        "final_loss": run.result.get("final_loss"),
        "step_s": run.raw.get("step_s"),
        **{name: run.cost.get(name) for name in KEPT},
        **{
            name: run.result.get(name)
            for name in ("predicted_bytes", "payload_bytes", "num_parameters", "samples")
        },
    }


def shown(row: dict[str, Any]) -> str:
    """A run as one printed line."""
    parts = [f"{row['rate']:,.0f} {row['unit']}" if row["rate"] else "no rate"]

    if row["mfu"]:
        parts.append(
            f"{100 * row['mfu']:.1f} % of {row['matmul_ceiling_flop_per_s'] / 1e12:.0f} TFLOP/s"
        )

    if row["peak_device_bytes"]:
        parts.append(f"{row['peak_device_bytes'] / 2**30:.2f} GiB on the device")
    return ", ".join(parts)


# -- beside a hand-written loop, and laws ----------------------------------------------------------


def hand_written(found: Found, device: str) -> None:
    """Trains ResNet-50 on synthetic images by the suite's loop and by one that a user would write.

    The two take turns in this process.
    """
    small = device == "cpu"
    known = plugins.find("workload", "cnn").presets

    if not small and "gpu" not in known:
        found.absent.append("cnn/gpu beside a hand-written loop")
        return

    cell = Cell(
        workload="cnn",
        preset="comm" if small else "gpu",
        precision="bf16",
        device=device,
        budget=Budget(steps=4 if small else 30),
    )
    rates: Rates = compared(resolve(cell), rounds=2 if small else 7, warm_up=1 if small else 8)
    found.rates = rounded(rates)
    detail = (
        f"{rates.ratio:.4f} of {rates.median('hand'):,.1f} images/s, {len(rates.ours)} rounds "
        "in turn"
    )
    enough = small or rates.ratio >= LEAST_RATIO
    bound = "no bound on the CPU" if small else f"at least {LEAST_RATIO}"
    found.check(f"cnn/{cell.preset} beside a hand-written loop", enough, f"{detail}, {bound}")


def laws(found: Found, device: str) -> None:
    """Checks two laws on the device.

    Training in float64 equals one process on the CPU, and a gradient in bf16 is rounded but close.
    """
    for fields in LAWS:
        cell = tiny(device=device, **fields)
        pieces = f", {accumulated(cell)} micro-batches" if accumulated(cell) > 1 else ""
        asked(
            found,
            f"{cell.label}{pieces} equals one process",
            partial(equals_one_process, thread_ranks, cell),
        )

    asked(
        found,
        "a bf16 gradient is the fp32 one, rounded",
        partial(bf16_is_close, thread_ranks, tiny(device=device)),
    )


def asked(found: Found, name: str, law: Callable[[], Figure]) -> None:
    """Checks one law and notes its figure."""
    figure = law()
    found.check(name, figure.holds, str(figure))


if __name__ == "__main__":
    sys.exit(main())
