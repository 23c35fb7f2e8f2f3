"""What the installed torch can do.

A subprocess looks, so that this process imports no torch.
"""

from __future__ import annotations

import json
import subprocess
import sys

from benchsuite.rules.setting import Machine

_PROBE = """
import json, torch, torch.distributed as dist
here = dist.is_available()
print(json.dumps({
    "torch": torch.__version__,
    "num_cuda_devices": torch.cuda.device_count() if torch.cuda.is_available() else 0,
    "gloo": here and dist.is_gloo_available(),
    "nccl": here and dist.is_nccl_available(),
    "mpi": here and dist.is_mpi_available(),
}))
"""
_TIMEOUT_S = 120.0  # a cold import of torch on a slow disk


def examine_torch() -> Machine:
    """Devices and backends of the installed torch; all None where torch cannot be imported."""
    # -P: no file of the working directory shadows a module
    command = [sys.executable, "-P", "-c", _PROBE]

    try:
        answer = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Machine()

    if answer.returncode != 0:
        return Machine()

    return Machine(**json.loads(answer.stdout.splitlines()[-1]))
