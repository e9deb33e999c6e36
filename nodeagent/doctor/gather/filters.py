"""Rules of packet filters that drop port 15008, or turn connections elsewhere.

This module owns asking nft(8) for the rules of one namespace and reading its answer. It promises to
change none, and that rules it does not understand are no finding: what a filter really does to the
port the probes say. `nft` also lists what iptables-nft has written.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Iterable
from typing import Any, Final

import msgspec

from nodeagent.doctor.facts import Drop

__all__ = ["FilterError", "Rules", "rules", "rules_of"]

SECONDS: Final = 5.0
"""For nft to list everything: tens of thousands of rules take one."""

MOST_BYTES: Final = 32 * 1024 * 1024
"""Of its answer: a hundred thousand rules. A pod with CAP_NET_ADMIN writes as many as it likes."""

_PORT: Final = 15008


class FilterError(Exception):
    """The rules cannot be read; the message says why."""


class Rules(msgspec.Struct, frozen=True):
    """`drops` drop the port; `redirects` give connections another destination, in words."""

    drops: tuple[Drop, ...] = ()
    redirects: tuple[str, ...] = ()


def rules(enter: str) -> Rules:
    """Return the rules of the calling thread's namespace that matter. Raises FilterError.

    `enter` goes before the commands that would take them out ("nsenter --net=… " or "").
    """
    program = shutil.which("nft", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if program is None:
        raise FilterError("nft is not installed")
    try:
        return rules_of(json.loads(_listed(program) or b"{}"), enter)
    except (OSError, ValueError) as error:
        raise FilterError(f"nft: {error}") from None


def _listed(program: str) -> bytes:
    """Return nft's answer. Raises OSError, ValueError."""
    with subprocess.Popen(
        [program, "--json", "--handle", "list", "ruleset"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        watchdog = threading.Timer(SECONDS, process.kill)
        watchdog.start()
        try:
            assert process.stdout is not None  # noqa: S101 - a pipe was asked for
            said = process.stdout.read(MOST_BYTES + 1)
            if len(said) > MOST_BYTES:
                process.kill()
                raise ValueError(f"more than {MOST_BYTES} bytes of rules")
            code = process.wait()
        finally:
            watchdog.cancel()
    if code:
        raise ValueError(f"it ended with {code}, or took more than {SECONDS:g} s")
    return said


def rules_of(ruleset: Any, enter: str = "") -> Rules:  # noqa: ANN401 - nft's JSON
    """Read a rule set in nft's JSON (libnftables-json(5)).

    A rule whose port is in a named set is left out: what is in there is not in the rule.
    """
    drops: list[Drop] = []
    redirects: list[str] = []
    items = ruleset.get("nftables", ()) if isinstance(ruleset, dict) else ()
    for item in items:
        rule = item.get("rule") if isinstance(item, dict) else None
        if not isinstance(rule, dict):
            continue
        parts = [part for part in rule.get("expr", ()) if isinstance(part, dict)]
        does = {name for part in parts for name in part}
        place = f"{rule.get('family')} {rule.get('table')} {rule.get('chain')}"
        handle = rule.get("handle")
        if does & {"drop", "reject"} and any(map(_names_port, parts)):
            command = f"{enter}nft delete rule {place} handle {handle}"
            drops.append(Drop(f"rule {handle} of {place}", command))
        if does & {"redirect", "dnat", "tproxy"}:
            redirects.append(f"packet filter rule {handle} of {place} redirects")
    return Rules(tuple(drops), tuple(redirects))


def _names_port(part: dict[str, Any]) -> bool:
    compared = part.get("match")
    if not isinstance(compared, dict):
        return False
    left = compared.get("left")
    payload = left.get("payload") if isinstance(left, dict) else None
    if not isinstance(payload, dict) or payload.get("field") not in ("dport", "sport"):
        return False
    if payload.get("protocol") not in ("tcp", "th"):
        return False
    contained = _contains(compared.get("right"))
    return (
        not contained if compared.get("op") == "!=" and contained is not None else bool(contained)
    )


def _contains(right: Any) -> bool | None:  # noqa: ANN401 - nft's JSON
    """Return whether a value, range or anonymous set holds the port; None if it cannot be told."""
    if isinstance(right, int):
        return right == _PORT
    if isinstance(right, dict):
        span = right.get("range")
        if isinstance(span, list) and len(span) == 2 and all(isinstance(x, int) for x in span):  # noqa: PLR2004 - from, to
            return bool(span[0] <= _PORT <= span[1])
        elements = right.get("set")
        if isinstance(elements, list):
            return _any_of(map(_contains, elements))
    return None


def _any_of(answers: Iterable[bool | None]) -> bool | None:
    known = list(answers)
    if any(known):
        return True
    return None if None in known else False
