"""Costs: closed forms by hand, fits that recover what points were made of, and left-out errors that
do not flatter."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from benchsuite.analysis import costs, fits
from benchsuite.analysis.costs import LARGEST_ERROR, OPERATIONS, Extrapolation, MessageModel
from benchsuite.analysis.fits import Link, Points

SIZES = [2.0**k for k in range(10, 27)]  # 1 KiB to 64 MiB
ALPHA = 30e-6
BETA = 0.2e-9
BELOW = Link(30e-6, 0.5e-9)
MEETS = Link(30e-6 + 0.4e-9 * 2**17, 0.1e-9)  # both lines meet at 128 KiB
JUMPS = Link(200e-6, 1e-9)  # another protocol
LINK = Link(0.001, 1e-6)  # 1 ms a message, 1 us a byte: 1000 bytes cost what a message costs


def made(
    alpha: float = ALPHA, beta: float = BETA, *, noise: float = 0.0, seed: int = 0, copies: int = 3
) -> Points:
    """Points of one straight line, with log-normal noise."""
    rng = np.random.default_rng(seed)
    return [
        (size, (alpha + beta * size) * math.exp(noise * rng.standard_normal()))
        for size in SIZES
        for _ in range(copies)
    ]


def kinked(above: Link, *, noise: float = 0.0) -> Points:
    """30 us and 0.5 ns a byte to 128 KiB, `above` from there on."""
    rng = np.random.default_rng(1)

    def seconds(size: float) -> float:
        return (BELOW if size <= 2**17 else above).seconds(size)

    return [
        (size, seconds(size) * math.exp(noise * rng.standard_normal()))
        for size in SIZES
        for _ in range(3)
    ]


# -- closed forms ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "by_hand"),
    [
        (costs.ring_s(LINK, num_workers=4, num_bytes=4000), 6 * (0.001 + 0.001)),
        (costs.ring_s(LINK, num_workers=1, num_bytes=4000), 0.0),
        (costs.halving_doubling_s(LINK, num_workers=4, num_bytes=4000), 4 * 0.001 + 1.5 * 0.004),
        (
            costs.halving_doubling_s(LINK, num_workers=5, num_bytes=4000),
            4 * 0.001 + 1.5 * 0.004 + 2 * 0.005,
        ),
        (costs.tree_s(LINK, num_workers=5, num_bytes=4000), 6 * 0.005),
        (costs.tree_s(LINK, num_workers=1, num_bytes=4000), 0.0),
        (costs.direct_s(LINK, num_workers=4, num_bytes=4000), 0.002 + 1.5 * 0.004),
        (costs.direct_s(LINK, num_workers=1, num_bytes=4000), 0.0),
        (costs.parameter_server_first_s(LINK, num_workers=4, num_bytes=4000), 0.002 + 8 * 0.004),
        (
            costs.parameter_server_first_s(LINK, num_workers=4, num_bytes=4000, num_servers=2),
            0.002 + 4.5 * 0.004,
        ),
        (
            costs.parameter_server_first_s(LINK, num_workers=1, num_bytes=4000, num_servers=2),
            0.002 + 1.5 * 0.004,
        ),
        (
            costs.parameter_server_first_s(LINK, num_workers=4, num_bytes=4000, with_workers=True),
            0.002 + 6 * 0.004,
        ),
        (
            costs.parameter_server_first_s(
                LINK, num_workers=4, num_bytes=4000, num_servers=4, with_workers=True
            ),
            0.002 + 2 * 0.004,
        ),
        (
            costs.parameter_server_first_s(LINK, num_workers=1, num_bytes=4000, with_workers=True),
            0.0,
        ),
        (costs.parameter_server_s(LINK, num_workers=4, num_bytes=4000), 0.002 + 5 * 0.004),
        (
            costs.parameter_server_s(
                LINK, num_workers=4, num_bytes=4000, num_servers=2, with_workers=True
            ),
            0.014,
        ),
        (costs.parameter_server_s(LINK, num_workers=1, num_bytes=4000, with_workers=True), 0.0),
        (costs.busiest_port_bytes(num_workers=4, num_bytes=4000, num_servers=2), 8000),
        (costs.busiest_port_bytes(num_workers=2, num_bytes=4000, num_servers=4), 4000),
        (
            costs.busiest_port_bytes(
                num_workers=4, num_bytes=4000, num_servers=4, with_workers=True
            ),
            6000,
        ),
        (
            costs.parameter_server_s(LINK, num_workers=4, num_bytes=4000, num_servers=2),
            0.002 + 3 * 0.004,
        ),
        (costs.all_gather_s(LINK, num_workers=4, num_bytes=4000), 3 * 0.002),
    ],
)
def test_closed_forms_are_those_of_the_design(found: float, by_hand: float) -> None:
    assert math.isclose(found, by_hand, rel_tol=1e-12, abs_tol=1e-15), (found, by_hand)


def test_a_ring_and_halving_doubling_move_the_same_bytes_and_differ_in_latencies() -> None:
    for num_workers in (2, 4, 8, 64):
        given = {"num_workers": num_workers, "num_bytes": 1e6}
        free = Link(0.0, 1e-9)
        assert math.isclose(costs.ring_s(free, **given), costs.halving_doubling_s(free, **given))  # type: ignore[arg-type]
        late = Link(1e-3, 0.0)
        assert math.isclose(costs.ring_s(late, **given), 2 * (num_workers - 1) * 1e-3)  # type: ignore[arg-type]
        assert math.isclose(
            costs.halving_doubling_s(late, **given), 2 * math.log2(num_workers) * 1e-3
        )  # type: ignore[arg-type]


def test_the_virtual_network_prices_an_all_reduce_by_the_same_form() -> None:
    from benchsuite.virtual.clock import VirtualClock
    from benchsuite.virtual.network import Network

    network = Network(VirtualClock(), range(8), link_mbit=80.0, latency_us=50.0)
    link = Link(50e-6, 100e-9)
    for kind, form in (("all_reduce", costs.ring_s), ("all_gather", costs.all_gather_s)):
        assert math.isclose(
            network.price(kind, 8, 64_000) / 1e9,
            form(link, num_workers=8, num_bytes=64_000),
            rel_tol=1e-6,
        )


# -- fits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_a_fit_recovers_alpha_and_beta_in_one_segment(noise: float) -> None:
    (segment,) = fits.fit_messages(made(noise=noise)).segments
    assert abs(segment.link.alpha_s / ALPHA - 1) < max(0.05, 1e-6), segment
    assert abs(segment.link.beta_s_per_byte / BETA - 1) < 0.05, segment
    assert math.isclose(Link(0.0, 8e-9).mbit, 1000.0)


@pytest.mark.parametrize("noise", [0.0, 0.03])
@pytest.mark.parametrize("above", [MEETS, JUMPS], ids=["meets", "jumps"])
def test_a_fit_finds_a_kink_and_both_lines(above: Link, noise: float) -> None:
    fitted = fits.fit_messages(kinked(above, noise=noise))
    assert len(fitted.segments) == 2, fitted
    lower, upper = fitted.segments
    assert 2**16 <= lower.high_bytes <= 2**18, lower
    for found, true in ((lower.link, BELOW), (upper.link, above)):
        assert abs(found.alpha_s / true.alpha_s - 1) < 0.15, fitted
        assert abs(found.beta_s_per_byte / true.beta_s_per_byte - 1) < 0.15, fitted


def test_one_slow_launch_does_not_bend_the_fit() -> None:
    points = [*made(), *[(size, 20 * (ALPHA + BETA * size)) for size in SIZES[::5]]]
    for size in SIZES:
        assert abs(fits.fit_messages(points).predict(size) / (ALPHA + BETA * size) - 1) < 0.02


def test_a_prediction_never_falls_with_the_size() -> None:
    dear_then_cheap = [
        (size, 1e-3 + 2e-9 * size if size < 2**18 else 0.5e-9 * size + 1e-4) for size in SIZES
    ]
    for fitted in (fits.fit_messages(dear_then_cheap), fits.fit_messages(kinked(JUMPS, noise=0.3))):
        predicted = [fitted.predict(size) for size in np.geomspace(512, 2**28, 500)]
        assert all(a <= b for a, b in itertools.pairwise(predicted))


def test_a_shaped_link_is_the_slower_of_host_and_rate() -> None:
    host = Link(ALPHA, BETA)  # 40 Gbit/s
    assert host.shaped(None) == host
    assert host.shaped(100_000) == host
    assert math.isclose(host.shaped(1000, 0.956).beta_s_per_byte, 8e-9 / 0.956)
    fitted = fits.fit_messages(made())
    assert math.isclose(fitted.predict(1e6, mbit=100.0), ALPHA + 0.08, rel_tol=0.01)


def test_too_few_sizes_and_impossible_times_are_refused() -> None:
    with pytest.raises(ValueError, match="2 sizes"):
        fits.fit_messages([(1.0, 1.0), (2.0, 2.0)])
    for bad in (0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="above 0 and finite"):
            fits.fit_messages([*made(), (4096.0, bad)])
    assert fits.left_out_sizes([(1.0, 1.0), (2.0, 2.0), (4.0, 4.0)]) == {}


# -- errors on what was not seen -------------------------------------------------------------------


def test_a_right_model_has_small_left_out_errors() -> None:
    errors = [abs(each.error) for each in fits.left_out_sizes(made(noise=0.03)).values()]
    assert len(errors) == len(SIZES) and max(errors) < 0.1, errors


def test_a_model_that_is_wrong_at_a_size_says_so() -> None:
    """The negative control: a dear protocol for one size, which no fit can know that has not seen
    it."""
    points = [(size, seconds * (3 if size == 2**15 else 1)) for size, seconds in made()]
    errors = {size: each.error for size, each in fits.left_out_sizes(points).items()}
    assert abs(errors[2**15]) > 0.6, errors
    model = MessageModel([points], shaped_points(0.956))
    ring = OPERATIONS["ring"]
    wrong = model.extrapolate(ring, num_workers=2, num_bytes=2 * 2**15, mbit=100_000)
    assert wrong.size_error is not None and wrong.size_error > LARGEST_ERROR and wrong.shown is None


def test_reaching_past_the_measured_sizes_is_tried_where_it_can_be_checked() -> None:
    straight = made()
    bent = [(size, ALPHA + BETA * size * (1 if size < 2**22 else 4)) for size in SIZES]
    assert fits.error_beyond(straight, 2**20) == 0.0
    far = fits.error_beyond(straight, 4 * SIZES[-1])
    assert far is not None and far < 1e-6
    wrong = fits.error_beyond(bent, 16 * SIZES[-1])  # from the sizes below 4 MiB nobody can tell
    assert wrong is not None and wrong > 0.5, wrong
    assert fits.error_beyond(straight, 2**60) is None  # as far as that cannot be tried
    model = MessageModel([bent], shaped_points(0.956))
    found = model.extrapolate(
        OPERATIONS["tree"], num_workers=2, num_bytes=16 * SIZES[-1], mbit=100_000
    )
    assert found.shown is None and found.error is not None and found.error > 0.5
    unknown = model.extrapolate(OPERATIONS["tree"], num_workers=2, num_bytes=2.0**60, mbit=1000)
    assert unknown.error is None and unknown.shown is None


def shaped_points(
    share: float, *, odd: float = 1.0, rates: tuple[float, ...] = (100, 200, 400)
) -> dict[float, Points]:
    """Messages over links of these rates; the fastest takes `odd` times as long as it should."""
    return {
        rate: [
            (size, (ALPHA + 8 * size / (share * rate * 1e6)) * (odd if rate == max(rates) else 1))
            for size in (2.0**18, 2.0**20)
        ]
        for rate in rates
    }


def test_the_payload_share_of_a_rate_is_found_and_left_out_rates_are_predicted() -> None:
    model = MessageModel([made()], shaped_points(0.956))
    assert abs(model.payload_share - 0.956) < 1e-3
    assert (
        set(model.rate_errors) == {100, 200, 400}
        and max(map(abs, model.rate_errors.values())) < 0.01
    )
    found = model.extrapolate(OPERATIONS["ring"], num_workers=4, num_bytes=4e6, mbit=1000)
    theory = 6 * (ALPHA + 8e6 / (0.956 * 1e9))
    assert found.shown is not None and abs(found.shown / theory - 1) < 0.01, (found, theory)
    assert found.low_s <= found.value_s <= found.high_s


def test_a_rate_that_the_others_do_not_foretell_is_an_error_and_nothing_is_shown() -> None:
    """The negative control of rates: the fastest link was limited by something else."""
    model = MessageModel([made()], shaped_points(0.956, odd=2.0))
    assert abs(model.rate_errors[400]) > 0.4, model.rate_errors
    found = model.extrapolate(OPERATIONS["ring"], num_workers=4, num_bytes=4e6, mbit=1000)
    assert found.rate_error is not None and found.rate_error > LARGEST_ERROR and found.shown is None


def test_without_shaped_links_no_time_at_a_rate_is_shown() -> None:
    for shaped in ({}, shaped_points(0.956, rates=(100,))):
        found = MessageModel([made()], shaped).extrapolate(
            OPERATIONS["ring"], num_workers=4, num_bytes=4e6, mbit=1000
        )
        assert found.rate_error is None and found.error is None and found.shown is None


def test_a_time_is_shown_up_to_a_quarter_of_error_and_not_above() -> None:
    for error, shown in ((0.0, 1.0), (0.25, 1.0), (0.2501, None)):
        for errors in ((error, 0.0), (0.0, error)):
            assert Extrapolation(1.0, 0.9, 1.1, *errors).shown == shown
    document = Extrapolation(1.0, 0.9, 1.1, 0.3, 0.1).to_json()
    assert document["shown_s"] is None and document["provenance"] == "modelled"
    json.dumps(document, allow_nan=False)


def test_the_interval_holds_every_launch_and_the_error() -> None:
    launches = [
        made(beta=BETA * factor, noise=0.02, seed=seed)
        for seed, factor in enumerate((0.8, 1.0, 1.2))
    ]
    model = MessageModel(launches, shaped_points(0.956))
    found = model.extrapolate(OPERATIONS["tree"], num_workers=2, num_bytes=4e7, mbit=1e6)
    for launch in launches:
        link = fits.fit_messages(launch).link(4e7)
        assert found.low_s <= costs.tree_s(link, num_workers=2, num_bytes=4e7) <= found.high_s
    assert found.error is not None and found.high_s / found.value_s >= 1 + found.error


def test_rates_may_be_tried_with_other_messages() -> None:
    one_way = MessageModel([made()], shaped_points(0.9))
    both = MessageModel([made(alpha=3 * ALPHA)], tried_with=one_way)
    assert both.payload_share == one_way.payload_share and both.rate_errors == one_way.rate_errors


def test_a_fit_is_plain_json() -> None:
    document = fits.fit_messages(kinked(JUMPS)).to_json()
    assert document["segments"][-1]["high_bytes"] is None
    json.dumps(document, allow_nan=False)
