"""A slow link on one machine: a private network's loopback, with a rate and Ethernet's packets.

What was found with kernel 6.18 and iproute2 6.1, and is relied on here:

    - `ip link set lo mtu 1500` comes first, before a connection is made. The loopback's packets of
      64 KiB would be charged one header per 64 KiB, and no network carries them. With 1500, 1448 of
      1514 bytes are payload, so 0.956 of the rate arrives.
    - `tc qdisc replace dev lo root tbf rate R burst B limit L` shapes what `lo` transmits, and that
      is both directions: data one way, acknowledgements the other. So only one message may be under
      way at a time; both ways at once would share the rate, which a full-duplex port does not.
    - tbf cuts TCP's super-packets at its burst. With 32 or 64 KiB a share of 0.938 arrives at 100
      to 400 Mbit/s; from 128 KiB on it is 0.956 to 0.957 from 100 to 1600 Mbit/s, so the burst is
      128 KiB.
    - A full bucket lets one burst through at memory speed. While messages follow each other it
      stays empty: two bursts go ahead of what is timed, and that is at least two bursts long.
    - `limit` holds more than TCP keeps under way, so nothing is dropped, whatever the congestion
      control.
    - netem (added latency) is not in every kernel, and is not used.

Where `tc` and `ip` may not do this, the reason is reported: an ordinary user's namespace loses
CAP_NET_ADMIN when a program is started. The machine's own loopback is never touched; without a
private network shaping is refused. This module imports no torch.
"""

from __future__ import annotations

import re
import subprocess
from types import TracebackType
from typing import Self

MTU = 1500
BURST_BYTES = 128 * 1024
LIMIT_BYTES = 64 * 2**20
WAIT_S = 10.0


class NotShaped(RuntimeError):
    """No link can be shaped here; the text of the error says why."""


class ShapedLoopback:
    """A context in which `lo` has Ethernet's packets and the rate last set.

    Afterwards `lo` is as it was before.
    """

    def __init__(self, *, private_network: bool, network_reason: str = "") -> None:
        self._private = private_network
        self._reason = network_reason
        self._mtu_before = ""

    def __enter__(self) -> Self:
        """Shapes the loopback.

        NotShaped where that cannot be done, and then nothing has been changed.
        """
        if not self._private:
            raise NotShaped(
                f"the machine's own loopback is not shaped: {self._reason or 'no private network'}"
            )

        found = re.search(r"\bmtu (\d+)", _run("ip", "link", "show", "lo"))
        if found is None:
            raise NotShaped("ip link show lo tells no mtu")
        self._mtu_before = found[1]
        _run("ip", "link", "set", "lo", "mtu", str(MTU))

        try:
            self.set_rate(1000)
        except NotShaped:
            _run("ip", "link", "set", "lo", "mtu", self._mtu_before)
            raise

        self.set_rate(None)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.set_rate(None)
        _run("ip", "link", "set", "lo", "mtu", self._mtu_before)

    def set_rate(self, mbit: float | None) -> None:
        """Sets the rate in 10^6 bits per second, headers included.

        None is as fast as the machine can.
        """
        if mbit is None:
            if "tbf" in _run("tc", "qdisc", "show", "dev", "lo"):
                _run("tc", "qdisc", "del", "dev", "lo", "root")
            return

        rate = f"{mbit:g}mbit"
        burst = f"{BURST_BYTES}b"
        limit = f"{LIMIT_BYTES}b"
        _run(
            "tc",
            "qdisc",
            "replace",
            "dev",
            "lo",
            "root",
            "tbf",
            "rate",
            rate,
            "burst",
            burst,
            "limit",
            limit,
        )


def _run(*command: str) -> str:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )
    except FileNotFoundError as error:
        raise NotShaped(f"{command[0]} is not installed (iproute2)") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotShaped(f"{' '.join(command)}: {error}") from error

    if done.returncode != 0:
        said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise NotShaped(f"{' '.join(command[:4])}: {said}")

    return done.stdout
