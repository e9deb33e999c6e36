"""Output of the load programs, read or refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from meshbench.parse import BadOutputError, congestion_controls, iperf3, load, wrk

WRK = """Running 3s test @ http://10.244.2.2:8080/
  1 threads and 64 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     1.99ms    2.21ms  26.86ms   92.60%
    Req/Sec    36.02k    10.06k   46.19k    84.21%
  68282 requests in 2.07s, 71.04MB read
Requests/sec:  32983.78
Transfer/sec:     34.32MB
"""

SS = """0      0      10.244.1.2:36632  10.244.2.2:5201
\t cubic wscale:7,7 rto:203 rtt:2.4/0.9 ato:40 mss:1448 cwnd:10
0      0      10.244.1.2:36633  10.244.2.2:5201
\t ts sack ecn bbr wscale:7,7 rto:203 bbr:(bw:1bps,mrtt:0.1)
"""
ALGORITHMS = frozenset({"bbr", "cubic", "reno"})


def iperf3_report(**received: float) -> dict[str, Any]:
    return {
        "start": {"test_start": {"num_streams": 8}},
        "end": {"sum_received": {"bytes": 5e9, "seconds": 4.0} | received},
    }


def test_iperf3() -> None:
    found = iperf3(json.dumps(iperf3_report()))
    assert found == {"gbit_per_second": 10.0, "gigabytes": 5.0, "seconds": 4.0, "streams": 8.0}


@pytest.mark.parametrize(
    "text, problem",
    [
        ("", "no JSON"),
        ("[]", "no object"),
        ('{"error": "the server is busy"}', "the server is busy"),
        ('{"start": {}, "end": {}}', "has no 'sum_received'"),
        (json.dumps(iperf3_report(bytes=0)), "0.0 bytes"),
    ],
)
def test_iperf3_refuses(text: str, problem: str) -> None:
    with pytest.raises(BadOutputError, match=problem):
        iperf3(text)


def test_wrk() -> None:
    assert wrk(WRK) == {"requests": 68282.0, "per_second": 32983.78}


@pytest.mark.parametrize(
    "line",
    [
        "  Socket errors: connect 0, read 3, write 0, timeout 0",
        "  Non-2xx or 3xx responses: 12",
    ],
)
def test_wrk_refuses_a_report_with_errors(line: str) -> None:
    with pytest.raises(BadOutputError, match=line.split(":", maxsplit=1)[0].strip()):
        wrk(WRK + line + "\n")


@pytest.mark.parametrize("text", ["", WRK.replace("68282", "0"), WRK.replace("Requests/sec", "")])
def test_wrk_refuses_a_report_without_a_rate(text: str) -> None:
    with pytest.raises(BadOutputError, match="no rate"):
        wrk(text)


def test_load() -> None:
    assert load('{"seconds": 2.5, "count": 3}\n') == {"seconds": 2.5, "count": 3.0}


@pytest.mark.parametrize("text", ["ready\n", '{"seconds": "long"}', "7"])
def test_load_refuses(text: str) -> None:
    with pytest.raises(BadOutputError):
        load(text)


def test_congestion_controls() -> None:
    assert congestion_controls(SS, ALGORITHMS) == {"bbr", "cubic"}
    assert congestion_controls("", ALGORITHMS) == set()
