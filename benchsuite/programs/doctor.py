"""`benchsuite doctor`: what this machine can do, and what is missing for what.

This process imports no torch; a subprocess looks at torch's parts.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from benchsuite.measure import environment, load, memory
from benchsuite.measure.torch_build import examine_torch
from benchsuite.measure.version import VERSION
from benchsuite.report import text
from benchsuite.rules import Machine

# Ends with 0 where a process may have a network of its own; it gets there as the cell host does.
_PROBE_NETWORK = """
from benchsuite.cluster import private_network
try:
    private_network.enter_private_network()
except private_network.NoNamespace as error:
    raise SystemExit(str(error))
"""

# Optional packages: name, what it is needed for, remedy.
PACKAGES = (
    ("scikit-learn", "workload = cnn, preset digits", "pip install scikit-learn"),
    ("asv", "the asv front end", "pip install 'benchsuite[asv]'"),
    ("gymnasium", "the test that holds CartPole bit-equal", "pip install 'benchsuite[gym]'"),
)


@dataclass(frozen=True)
class Row:
    """One finding of the doctor; `remedy` is empty where nothing is missing."""

    what: str
    found: str
    needed_for: str
    remedy: str = ""

    @property
    def ok(self) -> bool:
        """Whether nothing is missing."""
        return not self.remedy


def examine() -> dict[str, Any]:
    """Looks at the machine, which takes seconds because torch is started.

    Returns `{"benchsuite", "machine", "rows": [{what, found, needed_for, remedy, ok}]}`.
    """
    rows = [*_machine(), *_torch(examine_torch()), *_network(), *_tools(), *_packages()]
    return {
        "benchsuite": VERSION,
        "machine": environment.machine(),
        "rows": [asdict(row) | {"ok": row.ok} for row in rows],
    }


def table(findings: Mapping[str, Any]) -> str:
    """The findings as plain text: what, found, needed for; below it what is missing."""
    rows = [(row["what"], row["found"], row["needed_for"]) for row in findings["rows"]]
    head = ("what", "found", "needed for")
    lines = [f"benchsuite {findings['benchsuite']} on {findings['machine']}", ""]
    lines += text.aligned([head, *rows])
    missing = [row for row in findings["rows"] if not row["ok"]]
    lines += ["", "missing:" if missing else "nothing is missing"]
    lines += [f"  {row['what']}, for {row['needed_for']}: {row['remedy']}" for row in missing]
    return "\n".join(lines)


def private_network() -> str | None:
    """The reason why a process cannot have a network of its own; None where it can."""
    answer = _run_python(_PROBE_NETWORK, timeout_s=30)
    if answer.returncode == 0:
        return None
    return (answer.stderr.strip().splitlines() or ["the probe was killed"])[-1]


def _machine() -> Iterator[Row]:
    cores = load.num_cores()
    quota = load.cpu_quota()
    found = f"{cores} of {os.cpu_count()}" + (f" (quota {quota:g})" if quota else "")
    yield Row(
        "cores",
        found,
        "wall-clock figures of workers + servers <= cores",
        ""
        if cores >= 2
        else "one core: every run of two ranks is oversubscribed; counted figures remain valid",
    )
    size = environment.memory_bytes()
    yield Row(
        "memory", f"{size / 1024**3:.1f} GiB" if size else "unknown", "a copy of the model per rank"
    )
    yield Row("processor", environment.cpu_model(), "the name of the results folder")
    yield Row("threads", _thread_variables(), "1 thread per rank is set by the suite itself")
    version = ".".join(map(str, sys.version_info[:3]))
    yield Row(
        "python",
        version,
        "everything",
        "" if sys.version_info >= (3, 11) else "install Python 3.11 or newer",
    )
    yield Row(
        "cpu accounting",
        "yes" if load.tree_cpu_s(os.getpid()) is not None else "no",
        "the flag `contended`",
        ""
        if load.tree_cpu_s(os.getpid()) is not None
        else "this system has no /proc: CPU time of others is not known",
    )
    resets = memory.reset_peak()
    yield Row("peak memory", "per run" if resets else "since the fork", "peak_memory_bytes")


def _thread_variables() -> str:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    given = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
    return " ".join(given) or "no variable set"


def _torch(torch: Machine) -> Iterator[Row]:
    if torch.torch is None:
        yield Row(
            "torch",
            "cannot be imported",
            "everything but reports",
            "pip install torch (CPU build is enough)",
        )
        return

    yield Row("torch", torch.torch, "everything but reports")
    gloo = "" if torch.gloo else "install torch's wheel from pytorch.org: this build has no gloo"
    yield Row("gloo", _yes(torch.gloo), "backend = gloo, the default", gloo)
    yield from _accelerators(torch)
    # Its absence is not called missing: no wheel of torch has it, so no machine would be complete.
    yield Row(
        "mpi", _yes(torch.mpi), "backend = mpi, in a torch that is built from source against MPI"
    )


def _accelerators(torch: Machine) -> Iterator[Row]:
    """The rows on GPUs and nccl; only a machine that has a GPU can lack something here."""
    names = ", ".join(sorted(set(environment.gpus())))
    devices = torch.num_cuda_devices or 0

    if devices:
        yield Row("GPUs", f"{devices} {names}".strip(), "device = cuda")
    elif names:
        yield Row(
            "GPUs", f"{names}, unseen by torch", "device = cuda", "install a CUDA build of torch"
        )
    else:
        yield Row("GPUs", "none", "device = cuda")

    needs_nccl = bool(devices or names) and not torch.nccl
    yield Row(
        "nccl",
        _yes(torch.nccl),
        "backend = nccl",
        "install a CUDA build of torch" if needs_nccl else "",
    )


def _network() -> Iterator[Row]:
    refused = private_network()
    yield Row(
        "private network",
        "yes" if refused is None else "no",
        "wire_bytes, and ranks that nobody else can reach",
        ""
        if refused is None
        else f"{refused}; allow user namespaces (sysctl user.max_user_namespaces) or run as root",
    )
    control = environment.congestion_control()
    yield Row(
        "TCP congestion control",
        control or "unknown",
        "the caption: it moves loopback by a factor of 2",
    )
    tools = [name for name in ("ip", "tc") if not shutil.which(name)]
    yield Row(
        "ip, tc",
        f"without {', '.join(tools)}" if tools else "yes",
        "slow links of selfcheck and calibrate",
        "install iproute2" if tools else "",
    )


def _tools() -> Iterator[Row]:
    git = shutil.which("git")
    yield Row(
        "git", "yes" if git else "no", "the commit in every run", "" if git else "install git"
    )


def _packages() -> Iterator[Row]:
    for name, needed_for, remedy in PACKAGES:
        try:
            yield Row(name, importlib.metadata.version(name), needed_for)
        except importlib.metadata.PackageNotFoundError:
            yield Row(name, "no", needed_for, remedy)


def _yes(value: bool | None) -> str:
    return "yes" if value else "no"


def _run_python(code: str, *, timeout_s: float) -> subprocess.CompletedProcess[str]:
    # With -P no file of the working directory shadows a module.
    command = [sys.executable, "-P", "-c", code]
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no answer within {timeout_s:g} s")
