"""What a collective operation costs: the alpha-beta model, and how far it may be trusted.

Closed forms for N workers, vectors of M bytes and equal full-duplex ports: alpha seconds per
message, beta seconds per byte. An `Extrapolation` carries the errors of the fit on message sizes
and link rates that it has not seen; above 25 % it shows no number. That error is about messages:
how a form grows with N is theory (and a law of the virtual clock).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchsuite.analysis import fits
from benchsuite.analysis.fits import LeftOut, Link, MessageFit, Points

LARGEST_ERROR = 0.25  # on left-out sizes and rates; above it no time is shown

# -- closed forms: seconds of one operation --------------------------------------------------------


def ring_s(link: Link, *, num_workers: int, num_bytes: float) -> float:
    """All-reduce around a ring (Patarasuk and Yuan 2009): 2(N-1)(alpha + M/N beta)."""
    return 2 * (num_workers - 1) * link.seconds(num_bytes / num_workers)


def halving_doubling_s(link: Link, *, num_workers: int, num_bytes: float) -> float:
    """Recursive halving and doubling (Thakur et al. 2005): 2 log2 N alpha + 2(N-1)/N M beta.

    Off powers of two it runs on N' = 2^q < N, and the folded ranks send their vector before and get
    it back after.
    """
    rounds = int(math.log2(num_workers))
    inside = 1 << rounds
    seconds = (
        2 * rounds * link.alpha_s + 2 * (inside - 1) / inside * num_bytes * link.beta_s_per_byte
    )
    return seconds if inside == num_workers else seconds + 2 * link.seconds(num_bytes)


def tree_s(link: Link, *, num_workers: int, num_bytes: float) -> float:
    """Binomial reduce and broadcast: 2 ceil(log2 N)(alpha + M beta)."""
    return 2 * math.ceil(math.log2(num_workers)) * link.seconds(num_bytes)


def direct_s(link: Link, *, num_workers: int, num_bytes: float) -> float:
    """Reduce-scatter and all-gather straight to and from the owners.

    2 alpha + 2(N-1)/N M beta; 0 for one worker.
    """
    if num_workers == 1:
        return 0.0
    return 2 * link.alpha_s + 2 * (num_workers - 1) / num_workers * num_bytes * link.beta_s_per_byte


def parameter_server_first_s(
    link: Link,
    *,
    num_workers: int,
    num_bytes: float,
    num_servers: int = 1,
    with_workers: bool = False,
) -> float:
    """A synchronous step through S servers with nothing under way before.

    With servers on hosts of their own 2 alpha + (2N + S - 1)/S M beta: slices leave a worker one
    after the other, and the last server's begin when S - 1 of them have left. On the hosts of
    workers every server has one slice there already: (2N + S - 3)/S M beta, and (2N + S - 4)/S
    where S = N.
    """
    n = num_workers
    s = num_servers
    if with_workers and n == 1:
        return 0.0  # nothing leaves the host
    slices = 2 * n + s - (1 if not with_workers else 3 if s < n else 4)
    return 2 * link.alpha_s + slices / s * num_bytes * link.beta_s_per_byte


def parameter_server_s(
    link: Link,
    *,
    num_workers: int,
    num_bytes: float,
    num_servers: int = 1,
    with_workers: bool = False,
) -> float:
    """One of many such steps in a row, whose replies overlap the next pushes.

    With servers on hosts of their own 2 alpha + (N/S + 1) M beta. The latencies do not overlap:
    whoever is answered last pushes last. On the hosts of workers (N + 2S - 2)/S M beta, since a
    server's replies and its worker's pushes share a port; for S > N - 2 > 0 that is a bound from
    above.
    """
    if with_workers and num_workers == 1:
        return 0.0
    slices = num_workers + (2 * num_servers - 2 if with_workers else num_servers)
    return 2 * link.alpha_s + slices / num_servers * num_bytes * link.beta_s_per_byte


def busiest_port_bytes(
    *, num_workers: int, num_bytes: float, num_servers: int = 1, with_workers: bool = False
) -> float:
    """Bytes each way through the busiest port in such a step.

    With servers on hosts of their own max(M, N M/S); on the hosts of workers (N + S - 2) M/S.
    """
    if with_workers:
        return (num_workers + num_servers - 2) * num_bytes / num_servers
    return max(num_bytes, num_workers * num_bytes / num_servers)


def all_gather_s(link: Link, *, num_workers: int, num_bytes: float) -> float:
    """M bytes out, a part of every rank, around a ring: (N-1)(alpha + M/N beta)."""
    return (num_workers - 1) * link.seconds(num_bytes / num_workers)


# -- a model that was fitted to messages -----------------------------------------------------------


@dataclass(frozen=True)
class Operation:
    """How one operation is priced.

    `seconds(link, num_workers=, num_bytes=, [num_servers=])` is its closed form and
    `message_bytes(N, M, S)` the size of its longest message. `both_ways`: every rank sends and
    receives at once, so messages measured that way price it.
    """

    seconds: Callable[..., float]
    message_bytes: Callable[[int, float, int], float]
    both_ways: bool
    has_servers: bool = False


OPERATIONS: Mapping[str, Operation] = {
    "ring": Operation(ring_s, lambda n, m, s: m / n, both_ways=True),
    "halving_doubling": Operation(halving_doubling_s, lambda n, m, s: m / 2, both_ways=True),
    "tree": Operation(tree_s, lambda n, m, s: m, both_ways=False),
    "direct": Operation(direct_s, lambda n, m, s: m / n, both_ways=True),
    "parameter_server": Operation(
        parameter_server_s, lambda n, m, s: m / s, both_ways=True, has_servers=True
    ),
    "all_gather": Operation(all_gather_s, lambda n, m, s: m / n, both_ways=True),
}


@dataclass(frozen=True)
class Extrapolation:
    """A modelled time in seconds with its interval and the errors of the fit.

    Errors are shares, on sizes and rates that the fit has not seen. One that could not be had is
    None: nothing is shown then.
    """

    value_s: float
    low_s: float
    high_s: float
    size_error: float | None  # worst over the left-out sizes near the operation's messages
    rate_error: float | None  # worst over the left-out rates

    @property
    def error(self) -> float | None:
        """The larger of both errors; None where one could not be had."""
        return (
            None
            if self.size_error is None or self.rate_error is None
            else max(self.size_error, self.rate_error)
        )

    @property
    def shown(self) -> float | None:
        """The value in seconds; None where its error is above 25 %."""
        return self.value_s if self.error is not None and self.error <= LARGEST_ERROR else None

    def to_json(self) -> dict[str, Any]:
        """The same as plain numbers; `shown_s` is null where nothing is to be shown."""
        return {**vars(self), "error": self.error, "shown_s": self.shown, "provenance": "modelled"}


@dataclass(frozen=True)
class MessageModel:
    """Messages of one kind: the points of each launch, and points over links of other rates.

    A point is (bytes, seconds); rates are in Mbit/s. `tried_with`: the model of the messages that
    rates were tried with, where it is not this one.
    """

    launches: Sequence[Points]
    shaped: Mapping[float, Points] = field(default_factory=dict)
    tried_with: MessageModel | None = None

    @functools.cached_property
    def points(self) -> Points:
        """The points of all launches together."""
        return [point for launch in self.launches for point in launch]

    @functools.cached_property
    def fit(self) -> MessageFit:
        """The fit to the points of all launches."""
        return fits.fit_messages(self.points)

    @functools.cached_property
    def payload_share(self) -> float:
        """What headers leave of a link's rate; 1 where no link was shaped."""
        if self.tried_with is not None:
            return self.tried_with.payload_share
        return fits.payload_share(self.fit, self.shaped) or 1.0

    @functools.cached_property
    def left_out(self) -> Mapping[float, LeftOut]:
        """Left-out size -> what the fit without it says."""
        return fits.left_out_sizes(self.points)

    @functools.cached_property
    def rate_errors(self) -> Mapping[float, float]:
        """Left-out rate -> its worst relative error."""
        if self.tried_with is not None:
            return self.tried_with.rate_errors
        return fits.left_out_rates(self.fit, self.shaped)

    @functools.cached_property
    def _launch_fits(self) -> Sequence[MessageFit]:
        return [fits.fit_messages(launch) for launch in self.launches]

    def extrapolate(
        self,
        operation: Operation,
        *,
        num_workers: int,
        num_bytes: float,
        mbit: float,
        num_servers: int = 1,
    ) -> Extrapolation:
        """One operation on links of this rate.

        Its interval is the range over launches, widened by the error.
        """
        message = operation.message_bytes(num_workers, num_bytes, num_servers)
        servers = {"num_servers": num_servers} if operation.has_servers else {}

        def priced(fitted: MessageFit) -> float:
            link = fitted.link(message).shaped(mbit, self.payload_share)
            return operation.seconds(link, num_workers=num_workers, num_bytes=num_bytes, **servers)

        def at_rate(size: float) -> float:
            return self.fit.predict(size, mbit=mbit, payload_share=self.payload_share)

        near = fits.error_near(self.left_out, message, at_rate)
        beyond = fits.error_beyond(self.points, message)
        if beyond:
            near = max(near or 0.0, beyond)
        size_error = None if beyond is None else near
        rate_error = max(map(abs, self.rate_errors.values()), default=None)
        value = priced(self.fit)
        each = [priced(fitted) for fitted in self._launch_fits]
        wide = 1 + max(size_error or 0.0, rate_error or 0.0)
        return Extrapolation(
            value, min(value, *each) / wide, max(value, *each) * wide, size_error, rate_error
        )
