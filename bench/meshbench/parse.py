"""What iperf3, wrk, ss and our own load programs print, as numbers.

This module owns reading their output. It is pure, and refuses output that tells of an error or
lacks what is expected, so that a broken run never becomes a figure.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

__all__ = ["BadOutputError", "congestion_controls", "iperf3", "load", "wrk"]

GIGA: Final = 1e9


class BadOutputError(ValueError):
    """A program said that it failed, or something that is not understood."""


def _object(program: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise BadOutputError(f"{program} printed no JSON: {text[:200]!r}") from error
    if not isinstance(found, dict):
        raise BadOutputError(f"{program} printed no object: {text[:200]!r}")
    return found


def iperf3(text: str) -> dict[str, float]:
    """Read `iperf3 --json`: what the receiver got, without the part that `--omit` left out."""
    found = _object("iperf3", text)
    if "error" in found:
        raise BadOutputError(f"iperf3: {found['error']}")
    try:
        end = found["end"]["sum_received"]
        started = found["start"]["test_start"]
        received, seconds = float(end["bytes"]), float(end["seconds"])
        streams = int(started["num_streams"])
    except (KeyError, TypeError) as error:
        raise BadOutputError(f"iperf3: its report has no {error}") from error
    if received <= 0 or seconds <= 0:
        raise BadOutputError(f"iperf3: {received} bytes in {seconds} s")
    return {
        "gbit_per_second": received * 8 / seconds / GIGA,
        "gigabytes": received / GIGA,
        "seconds": seconds,
        "streams": float(streams),
    }


def load(text: str) -> dict[str, float]:
    """Read one line of our load program."""
    found = _object("load", text)
    if not all(isinstance(value, int | float) for value in found.values()):
        raise BadOutputError(f"load: not numbers only: {text[:200]!r}")
    return {key: float(value) for key, value in found.items()}


def wrk(text: str) -> dict[str, float]:
    """Read wrk's report."""
    trouble = re.search(r"Socket errors:.*|Non-2xx or 3xx responses:.*", text)
    if trouble:
        raise BadOutputError(f"wrk: {trouble[0]}")
    total = re.search(r"^ *(\d+) requests in ", text, re.MULTILINE)
    rate = re.search(r"^Requests/sec: *([\d.]+)$", text, re.MULTILINE)
    if not total or not rate or int(total[1]) == 0:
        raise BadOutputError(f"wrk: no rate in its report: {text[:200]!r}")
    return {"requests": float(total[1]), "per_second": float(rate[1])}


def congestion_controls(text: str, known: frozenset[str]) -> set[str]:
    """Read `ss -tinH`: which of the `known` algorithms its established connections use."""
    return set(known) & set(re.findall(r"^\s+(?:\S+ )*?([a-z]+) wscale", text, re.MULTILINE))
