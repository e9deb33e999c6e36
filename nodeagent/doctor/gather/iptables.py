"""Rules of iptables-legacy, which nft(8) does not list: by what `iptables-legacy-save` says.

This module owns reading that text. It promises that rules it does not understand are no finding,
and that the command for taking a rule out names it by all that it is made of. Pure.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from typing import Final

from nodeagent.doctor.facts import Drop

__all__ = ["DROPS", "REDIRECTS", "rules_of"]

DROPS: Final = frozenset({"DROP", "REJECT"})
REDIRECTS: Final = frozenset({"REDIRECT", "DNAT", "TPROXY"})
"""Targets of iptables-extensions(8), also where iptables-nft has written them."""

_PORTS: Final = ("--dport", "--sport", "--dports", "--sports", "--ports")
_TCP: Final = ("tcp", "all")
_LOOPBACK: Final = ("127.", "::1/")


def rules_of(text: str, program: str, port: int, enter: str = "") -> Iterator[Drop | str]:
    """Yield rules that drop `port`, and in words those that give TCP another destination.

    `program` is what takes a rule out ("iptables-legacy"), `enter` what goes before it.
    """
    table = ""
    for line in text.splitlines():
        if line.startswith("*"):
            table = line[1:].strip()
        if not line.startswith("-A "):
            continue
        try:
            words = shlex.split(line)
        except ValueError:
            continue
        rule = f"{program} -t {shlex.quote(table)} {shlex.join(words)}"
        target = _option(words, "-j")[1]
        if target in DROPS and any(_names(words, option, port) for option in _PORTS):
            remove = shlex.join(["-D", *words[1:]])
            yield Drop(rule, f"{enter}{program} -t {shlex.quote(table)} {remove}")
        elif target in REDIRECTS and _may_turn_tcp(words):
            yield f"packet filter rule {rule} redirects"


def _option(words: Sequence[str], name: str) -> tuple[bool, str]:
    """Return whether an option is negated, and its value, empty without it."""
    for number, word in enumerate(words[:-1]):
        if word == name:
            return words[number - 1] == "!", words[number + 1]
    return False, ""


def _names(words: Sequence[str], option: str, port: int) -> bool:
    negated, value = _option(words, option)
    return bool(value) and any(_holds(each, port) for each in value.split(",")) is not negated


def _holds(span: str, port: int) -> bool:
    first, colon, last = span.partition(":")
    try:
        return int(first) <= port <= int(last if colon else first)
    except ValueError:
        return False


def _may_turn_tcp(words: Sequence[str]) -> bool:
    """Whether a rule may concern TCP of the pod. To a loopback address nothing is captured: a
    container runtime's own name server is reached so.
    """
    negated, protocol = _option(words, "-p")
    if protocol and (protocol in _TCP) is negated:
        return False
    negated, to = _option(words, "-d")
    return negated or not to.startswith(_LOOPBACK)
