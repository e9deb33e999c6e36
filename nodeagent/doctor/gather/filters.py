"""Rules of packet filters that drop port 15008, or turn connections elsewhere.

This module owns asking nft(8) for the rules of one namespace and reading its answer, and, where the
kernel has tables of iptables-legacy there, `iptables-legacy-save`. It promises to change none, that
rules it does not understand are no finding (what a filter really does to the port the probes say),
and that what cannot be read is told. `nft` also lists what iptables-nft has written.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from nodeagent.doctor.facts import Drop
from nodeagent.doctor.gather import iptables

__all__ = ["Rules", "rules", "rules_of"]

SECONDS: Final = 5.0
"""For nft to list everything: tens of thousands of rules take one."""

MOST_BYTES: Final = 32 * 1024 * 1024
"""Of its answer: a hundred thousand rules. A pod with CAP_NET_ADMIN writes as many as it likes."""

PLACES: Final = "/usr/sbin:/sbin:/usr/bin:/bin"

NET: Final = Path("/proc/thread-self/net")
LEGACY: Final[Mapping[str, str]] = {
    "iptables-legacy": "ip_tables_names",
    "ip6tables-legacy": "ip6_tables_names",
}
"""Commands, and the kernel's lists of their tables in a namespace: empty where nobody used them."""

_PORT: Final = 15008
_NOT_TCP: Final = ("udp", "udplite", "sctp", "dccp", "icmp", "icmpv6")


class Rules(msgspec.Struct, frozen=True):
    """`drops` drop the port; `redirects` give connections another destination, in words;
    `problems`: which rules could not be read, and why.
    """

    drops: tuple[Drop, ...] = ()
    redirects: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def rules(enter: str) -> Rules:
    """Return the rules of the calling thread's namespace that matter, and what was not seen.

    `enter` goes before the commands that would take them out ("nsenter --net=… " or "").
    """
    found: list[Drop | str] = []
    problems: list[str] = []
    for listed in (_nft, _legacy):
        try:
            found += listed(enter)
        except (OSError, ValueError) as error:
            problems.append(str(error))
    return Rules(
        tuple(each for each in found if isinstance(each, Drop)),
        tuple(each for each in found if isinstance(each, str)),
        tuple(problems),
    )


def _nft(enter: str) -> list[Drop | str]:
    said = _listed("nft", "--json", "--handle", "list", "ruleset")
    return [*rules_of(json.loads(said or b"{}"), enter)]


def _legacy(enter: str) -> list[Drop | str]:
    """Rules of the older interface of the kernel, which has tables of its own."""
    found: list[Drop | str] = []
    for program, names in LEGACY.items():
        with contextlib.suppress(FileNotFoundError):
            tables = (NET / names).read_text(encoding="ascii")
            if tables.strip():
                text = _listed(f"{program}-save").decode(errors="replace")
                found += iptables.rules_of(text, program, _PORT, enter)
    return found


def _listed(name: str, *arguments: str) -> bytes:
    """Return what a program says. Raises OSError, ValueError."""
    program = shutil.which(name, path=PLACES)
    if program is None:
        raise ValueError(f"{name} is not installed")
    with subprocess.Popen(
        [program, *arguments],
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
                raise ValueError(f"{name}: more than {MOST_BYTES} bytes of rules")
            code = process.wait()
        finally:
            watchdog.cancel()
    if code:
        raise ValueError(f"{name}: it ended with {code}, or took more than {SECONDS:g} s")
    return said


def rules_of(ruleset: Any, enter: str = "") -> Iterator[Drop | str]:  # noqa: ANN401 - nft's JSON
    """Read a rule set in nft's JSON (libnftables-json(5)): rules that drop the port, and in words
    those that give TCP another destination.

    A rule whose port is in a named set, or in a module of iptables, is left out: what is in there
    is not in the rule.
    """
    items = ruleset.get("nftables", ()) if isinstance(ruleset, dict) else ()
    for item in items:
        rule = item.get("rule") if isinstance(item, dict) else None
        if not isinstance(rule, dict):
            continue
        parts = [part for part in rule.get("expr", ()) if isinstance(part, dict)]
        does = {name for part in parts for name in part} | _targets(parts)
        place = f"{rule.get('family')} {rule.get('table')} {rule.get('chain')}"
        handle = rule.get("handle")
        if does & {"drop", "reject", *iptables.DROPS} and any(map(_names_port, parts)):
            command = f"{enter}nft delete rule {place} handle {handle}"
            yield Drop(f"rule {handle} of {place}", command)
        redirects = does & {"redirect", "dnat", "tproxy", *iptables.REDIRECTS}
        if redirects and not any(map(_spares_tcp, parts)):
            yield f"packet filter rule {handle} of {place} redirects"


def _targets(parts: Iterable[dict[str, Any]]) -> set[str]:
    """Return what iptables-nft has a rule do where nft has no word of its own for it."""
    modules = (part.get("xt") for part in parts)
    return {
        str(each.get("name"))
        for each in modules
        if isinstance(each, dict) and each.get("type") == "target"
    }


def _spares_tcp(part: dict[str, Any]) -> bool:
    """Whether a condition leaves the pod's TCP out: another protocol, or a loopback address, to
    which nothing is captured (a container runtime's own name server is reached so).
    """
    compared = part.get("match")
    if not isinstance(compared, dict) or compared.get("op") != "==":
        return False
    left, right = compared.get("left"), compared.get("right")
    if not isinstance(left, dict):
        return False
    if left.get("meta") == {"key": "l4proto"}:
        return isinstance(right, str) and right != "tcp"
    payload = left.get("payload")
    if not isinstance(payload, dict):
        return False
    if payload.get("field") == "daddr":
        prefix = right.get("prefix") if isinstance(right, dict) else None
        address = prefix.get("addr") if isinstance(prefix, dict) else right
        return isinstance(address, str) and (address == "::1" or address.startswith("127."))
    return payload.get("protocol") in _NOT_TCP


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
