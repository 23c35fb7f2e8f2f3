"""What a run ran on: machine, versions, commit, kernel, network and environment variables.

Variables are recorded by a list of allowed names. The environment is written once per host as
results/<machine>/env/<id>.json; runs refer to it by id. Nothing here names a host or a user.
Imports no torch.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from benchsuite.measure import load
from benchsuite.measure.version import VERSION
from benchsuite.plan.hashing import canonical, checksum
from benchsuite.plan.plugins import PACKAGE

PACKAGES = ("torch", "numpy", "scipy", "pandas", "scikit-learn", "psutil", "greenlet", "gymnasium")
# Recorded as they stand. No secrets and no names: a variable that may hold a path or an address is
# not here.
VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "OMP_PROC_BIND",
    "OMP_PLACES",
    "OMP_WAIT_POLICY",
    "KMP_AFFINITY",
    "KMP_BLOCKTIME",
    "GOMP_CPU_AFFINITY",
    "MALLOC_ARENA_MAX",
    "PYTHONHASHSEED",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "GLIBC_TUNABLES",
    "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
    "NCCL_ALGO",
    "NCCL_PROTO",
    "NCCL_P2P_DISABLE",
    "NCCL_SHM_DISABLE",
    "NCCL_IB_DISABLE",
    "NCCL_NVLS_ENABLE",
    "NCCL_BUFFSIZE",
    "NCCL_NTHREADS",
    "TORCH_NCCL_BLOCKING_WAIT",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_LAUNCH_BLOCKING",
    "CUBLAS_WORKSPACE_CONFIG",
    "PYTORCH_CUDA_ALLOC_CONF",
    "NVIDIA_TF32_OVERRIDE",
    "SLURM_JOB_NUM_NODES",
    "SLURM_NTASKS",
    "SLURM_CPUS_PER_TASK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
)
# Interfaces whose names begin so come and go with containers.
_PASSING = re.compile(r"^(lo|veth|br-|docker|virbr|tap|tun|ifb|dummy|cni|flannel|cali)")


def collect() -> dict[str, Any]:
    """The environment of this host as plain JSON, without times.

    It is the same on every call until something changes.
    """
    commit, dirty = code_version()
    return {
        "machine": machine(),
        "cpu": cpu_model(),
        "gpus": gpus(),
        "cores": load.num_cores(),
        "memory_bytes": memory_bytes(),
        "system": platform.system(),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "congestion_control": congestion_control(),
        "nics": nics(),
        "python": platform.python_version(),
        "benchsuite": VERSION,
        "versions": versions(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "commit": commit,
        "dirty": dirty,
    }


def machine() -> str:
    """A name for this make of machine, such as `amd-epyc-7b13-2c-1f3a9c`.

    It holds the processor or GPU, the cores and a hash of the hardware, never the host's name. Two
    machines of the same make share it; the environment of each run tells them apart.
    """
    cards = gpus()
    model = cards[0] if cards else cpu_model()
    # Trade marks, the clock rate and the number of cores tell nothing of the make.
    words = re.sub(r"\((r|tm|c)\)|\bcpu\b|\bprocessor\b|@.*|\b\d+-core\b", " ", model.lower())
    name = "-".join(re.findall(r"[a-z0-9]+", words))[:40].strip("-") or "unknown"
    memory_gib = round((memory_bytes() or 0) / 1024**3)
    hardware = [cpu_model(), cards, load.num_cores(), memory_gib, platform.machine()]
    digest = checksum(canonical(hardware).encode())[:6]
    count = f"-x{len(cards)}" if len(cards) > 1 else ""

    return f"{name}{count}-{load.num_cores()}c-{digest}"


@functools.cache
def cpu_model() -> str:
    """The processor as the kernel names it, e.g. `AMD EPYC 7B13`."""
    text = _text("/proc/cpuinfo") or ""
    for key in ("model name", "Model", "cpu model", "uarch"):
        if found := re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE):
            return found[1].strip()

    return platform.processor() or platform.machine() or "unknown"


@functools.cache
def gpus() -> tuple[str, ...]:
    """Models of the NVIDIA devices, from the driver's own files, else from nvidia-smi."""
    found = [
        _text(path) or "" for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    ]
    models = [
        model[1].strip()
        for text in found
        if (model := re.search(r"^Model:\s*(.+)$", text, re.MULTILINE))
    ]

    if not models and shutil.which("nvidia-smi"):
        listing = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
        models = [line.strip() for line in (listing or "").splitlines() if line.strip()]

    return tuple(models)


def memory_bytes() -> int | None:
    """Physical memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def congestion_control() -> str | None:
    """The congestion control of TCP in this network namespace.

    It moves figures on loopback by a factor of 2. None where the kernel does not say.
    """
    text = _text("/proc/sys/net/ipv4/tcp_congestion_control")
    return text.strip() if text else None


def nics() -> list[str]:
    """The network interfaces that stay: no loopback, no virtual ones of containers."""
    lines = (_text("/proc/thread-self/net/dev") or "").splitlines()[2:]
    names = sorted(line.split(":")[0].strip() for line in lines)

    return [name for name in names if not _PASSING.match(name)]


def versions() -> dict[str, str | None]:
    """Installed versions by package metadata, without importing; None = not installed."""
    found: dict[str, str | None] = {}

    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None

    return found


def code_version() -> tuple[str, bool]:
    """(commit, dirty) of the clone this code runs from; (`wheel <version>`, False) outside a clone.

    Dirty: a file under benchsuite/ or workloads/ differs from the commit, untracked ones included.
    """
    clone = PACKAGE.parent
    top = _output("git", "-C", str(clone), "rev-parse", "--show-toplevel", "HEAD")
    lines = (top or "").split()
    if len(lines) != 2 or Path(lines[0]).resolve() != clone:
        return f"wheel {VERSION}", False

    status = _output(
        "git", "-C", str(clone), "status", "--porcelain", "--", "benchsuite", "workloads"
    )
    return lines[1], status is None or bool(status.strip())


def _text(path: str | Path) -> str | None:
    """The content of a file; None where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _output(*command: str) -> str | None:
    """A short command's output; None where it is missing, fails or takes longer than 10 s."""
    # A hook's GIT_DIR would point git at another repository, and a status must not take the lock of
    # the index.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    variables["GIT_OPTIONAL_LOCKS"] = "0"

    try:
        done = subprocess.run(
            command,
            env=variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None

    return done.stdout if done.returncode == 0 else None
