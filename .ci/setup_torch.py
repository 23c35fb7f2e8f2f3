"""Installs torch's CPU build where there is no NVIDIA GPU; `make setup` runs it before all else.

On Linux a plain `pip install torch` takes a build for GPUs, with several GB of CUDA libraries.
Where no GPU is found, torch alone comes from an index of CPU builds, if that answers within 3 s. In
every other case nothing is done here: pip takes torch from its default index, with what else is
needed.

    python .ci/setup_torch.py --index https://download.pytorch.org/whl/cpu

The Python that runs it is the one that torch is installed for. The standard library is enough.
"""

from __future__ import annotations

import argparse
import http.client
import importlib.metadata
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
ANSWER_S = 3.0
DRIVER_S = 10.0  # nvidia-smi takes some seconds on a machine with many GPUs
# what NVIDIA's driver makes for its devices, also where nvidia-smi is not installed
DRIVER_FILES = (Path("/proc/driver/nvidia/gpus"), Path("/dev/nvidia0"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Always 0: what is not installed here is installed by the next command of the set-up."""
    parser = argparse.ArgumentParser(description="torch's CPU build where there is no NVIDIA GPU")
    parser.add_argument(
        "--index", default="", metavar="URL", help="index of CPU builds; empty: pip's default index"
    )
    index = parser.parse_args(arguments).index.rstrip("/")
    if not index or sys.platform != "linux":  # elsewhere the default build has no CUDA in it
        return 0
    if is_installed(pinned()) or has_gpu():
        return 0
    refused = why_unreachable(f"{index}/torch/")
    if not refused:
        print(f"setup: no NVIDIA GPU here, torch's CPU build is taken from {index}", flush=True)
        if install(index):
            return 0
        refused = "has no build that pip can install here"
    print(
        f"setup: {index} {refused}: torch comes from pip's default index, which on Linux may cost "
        "several GB of CUDA libraries; make TORCH_INDEX=URL names another index of CPU builds",
        flush=True,
    )
    return 0


def pinned() -> str:
    """The version of torch in constraints.txt."""
    found = re.search(r"^torch==(\S+)", CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise SystemExit(f"{CONSTRAINTS} pins no torch: it needs a line torch==VERSION")
    return found[1]


def is_installed(version: str) -> bool:
    """Whether this Python has that version of torch, of whatever build (2.13.0+cpu is 2.13.0)."""
    try:
        return importlib.metadata.version("torch").partition("+")[0] == version
    except importlib.metadata.PackageNotFoundError:
        return False


def has_gpu() -> bool:
    """Whether the driver's files or nvidia-smi name an NVIDIA GPU."""
    for path in DRIVER_FILES:
        if path.is_dir() and any(path.iterdir()):
            return True
        if path.exists() and not path.is_dir():
            return True
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DRIVER_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and listed.stdout.startswith("GPU ")


def why_unreachable(page: str) -> str:
    """What is wrong with an index's page, in words that follow its name; "" where it answers.

    A thread asks, because a time limit of a socket holds neither for a name that is looked up nor
    for a server that answers by one byte every now and then.
    """
    said: list[str] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(page, timeout=2 * ANSWER_S) as answer:
                answer.read()
            said.append("")
        except urllib.error.HTTPError as error:
            said.append(f"answers HTTP {error.code}")
        except urllib.error.URLError as error:
            said.append(f"cannot be reached ({error.reason})")
        except (OSError, ValueError, http.client.HTTPException) as error:
            said.append(f"cannot be reached ({error})")

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(ANSWER_S)
    return said[0] if said else f"does not answer within {ANSWER_S:g} s"


def install(index: str) -> bool:
    """Installs torch alone: what it needs is pinned too, and comes with the rest of the set-up."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--no-deps"]
    command = [*pip, "--index-url", index, "-c", str(CONSTRAINTS), "torch"]
    return subprocess.run(command, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
