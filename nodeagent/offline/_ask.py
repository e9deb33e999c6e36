"""What a person calls a caller and a destination, as what a connection shows.

This module owns the spellings: workloads by "namespace/name", SPIFFE IDs, addresses, services by
"namespace/host" or host. It promises that a name means one thing or is refused with what to write
instead, and that a service leads where ztunnel would take it. It is pure, and leaves judging to
`_offline`.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable
from typing import Final

import msgspec

from nodeagent.api import quote, values
from nodeagent.offline._offline import Offline
from ztunnel import address
from ztunnel.authorize import Verdict
from ztunnel.protocol import Service, Workload
from ztunnel.route import endpoints
from ztunnel.spiffe import SpiffeId, SpiffeIdError

__all__ = [
    "PLAINTEXT",
    "Caller",
    "QuestionError",
    "Target",
    "address_of",
    "as_seen",
    "caller",
    "is_itself",
    "judge",
    "proves_identity",
    "sources",
    "split_port",
    "targets",
]

PLAINTEXT: Final = "plaintext"
"""A caller of whom nothing is known but that it has no identity."""

_SCHEME: Final = "spiffe://"

_PORT: Final = re.compile(r"([0-9.]+|\[[0-9A-Fa-f:.]+\]):[0-9]+")
"""An address with a port, as the access log has callers: the port means nothing to a policy."""

MAX_SOURCES: Final = 64
"""Addresses of one caller that are judged each for itself; a caller with more must name one."""

_SUGGESTED: Final = 3
"""Names that are offered for one that is not known."""

_SEARCHED: Final = 1000
"""Names that are compared for them: a table may have thousands that are not known."""

_SCANNED: Final = 20_000
"""Names that are looked through for one in other letters, or in another namespace: 10 ms."""


class QuestionError(Exception):
    """A question cannot be asked like this; the message says why, and what to write."""


class Caller(msgspec.Struct, frozen=True):
    """Who calls. `identity` is None for plaintext, `sources` are empty if they are not known."""

    name: str
    identity: SpiffeId | None
    sources: tuple[bytes, ...] = ()

    def sources_for(self, destination: bytes) -> tuple[bytes, ...]:
        """Return the addresses to call from: of the destination's family, if there is one.

        Not the destination itself, if there is another: who calls itself is not judged.
        """
        wanted = address.is_ipv4(destination)
        alike = [each for each in self.sources if address.is_ipv4(each) is wanted]
        others = [each for each in alike if each != destination]
        return tuple(others or alike or self.sources)


class Target(msgspec.Struct, frozen=True):
    """What is called: a workload (uid, "" for one outside of the configuration) at one address."""

    workload: str
    address: bytes
    port: int


def caller(off: Offline, text: str) -> Caller:
    """Return who is meant by a workload, a SPIFFE ID, an address or PLAINTEXT.

    Raises QuestionError.
    """
    if text == PLAINTEXT:
        return Caller(text, None)
    packed = _packed(_PORT.sub(r"\1", text))
    if packed is not None:
        found = off.workload_at(packed)
        return Caller(text, _identity(found), (packed,))
    # A uid has one slash, an identity without its scheme more.
    if text.startswith(_SCHEME) or text.count("/") > 1:
        return _by_identity(off, text)
    workload = off.workloads.get(text)
    if workload is None:
        raise QuestionError(
            f"{quote(text)} is no workload of this configuration"
            f"{_like(text, (PLAINTEXT, *off.workloads))}; "
            "name a workload as NAMESPACE/NAME, a SPIFFE ID, an address, or "
            f"{PLAINTEXT!r} for a caller of whom nothing is known"
        )
    return Caller(text, _identity(workload), _addresses(workload))


def as_seen(off: Offline, caller: Caller, target: Target) -> Caller:
    """Return `caller` as `target` sees it: without its identity where DISABLE is in force.

    Not one that was named by its SPIFFE ID: that may be any client of HBONE, and knows no mode.
    """
    if caller.identity is not None and caller.name == str(caller.identity):
        return caller
    shown = off.shown(target.workload, target.port, caller.identity)
    return msgspec.structs.replace(caller, identity=shown)


def judge(off: Offline, who: Caller, source: bytes, target: Target) -> Verdict | None:
    """Return the verdict on `who` calling from `source`, None if nobody judges it.

    That is so outside the mesh, and within a pod: its calls to itself do not leave it.
    """
    if is_itself(off, who, source, target):
        return None
    identity = as_seen(off, who, target).identity
    return off.judge(target.workload, target.port, identity, source, target.address)


def proves_identity(off: Offline, who: Caller, target: Target) -> bool:
    """Return whether `target` is shown an identity by `who`."""
    itself = any(is_itself(off, who, each, target) for each in who.sources_for(target.address)[:1])
    seen = as_seen(off, who, target)
    return off.judged(target.workload) and seen.identity is not None and not itself


def is_itself(off: Offline, who: Caller, source: bytes, target: Target) -> bool:
    """Return whether `who`, calling from `source`, is the called workload."""
    found = off.workload_at(source)
    if found is None or found.uid != target.workload:
        return False
    return who.identity is None or str(who.identity) == found.identity


def address_of(text: str) -> bytes:
    """Return an address, packed. Raises QuestionError."""
    packed = _packed(text)
    if packed is None:
        raise QuestionError(f"{quote(text)} is no IP address")
    return packed


def _by_identity(off: Offline, text: str) -> Caller:
    try:
        identity = SpiffeId.parse(_SCHEME + text.removeprefix(_SCHEME))
    except SpiffeIdError as error:
        raise QuestionError(f"{quote(text)}: {error}") from None
    name = str(identity)
    holders = off.by_identity.get(name, ())
    return Caller(name, identity, tuple(each for held in holders for each in _addresses(held)))


def _identity(workload: Workload | None) -> SpiffeId | None:
    if workload is None or not workload.identity:
        return None
    return SpiffeId.parse(workload.identity)


def _addresses(workload: Workload) -> tuple[bytes, ...]:
    return tuple(map(address.pack, workload.addresses))


def sources(off: Offline, who: Caller, target: Target) -> tuple[bytes, ...]:
    """Return the addresses to judge `who` from: one where all get the same verdict, else all.

    Raises QuestionError if the verdict depends on the address, and it is not known.
    """
    found = who.sources_for(target.address)
    asking = off.asks_source(target.workload, target.port, who.identity)
    if not asking:
        return found[:1] or (address.ANY,)
    if not found or len(found) > MAX_SOURCES:
        count = f", and {who.name} has {len(found)}" if found else ""
        raise QuestionError(
            f"the answer depends on the caller's address, by {asking}{count}: name one with "
            "--from-address (in a table of tests: source)"
        )
    return found


def split_port(text: str) -> tuple[str, int]:
    """Return name and port of NAME:PORT, an IPv6 address in brackets. Raises QuestionError."""
    name, colon, digits = text.rpartition(":")
    bare = name.removeprefix("[").removesuffix("]")
    if not colon or not name:
        raise QuestionError(f"{quote(text)} names no port: write NAME:PORT")
    if ":" in name and bare == name:
        raise QuestionError(f"{quote(text)}: write an IPv6 address as [ADDRESS]:PORT")
    if not (digits.isascii() and digits.isdigit()) or len(digits) > len(str(values.MAX_PORT)):
        raise QuestionError(f"{quote(digits)} is no port: write a number")
    try:
        return bare, values.port(int(digits))
    except ValueError as error:
        raise QuestionError(str(error)) from None


def targets(off: Offline, name: str, port: int) -> tuple[Target, ...]:
    """Return what stands behind a name on a port: each address of a workload, or each endpoint.

    `name` is a workload, a service or an address. Raises QuestionError.
    """
    packed = _packed(name)
    if packed is not None:
        return _at(off, packed, port)
    workload = off.workloads.get(name)
    if workload is not None:
        return _of_workload(workload, port)
    services = off.services_called.get(name, ())
    if not services:
        known = [*off.workloads, *off.state.services]
        raise QuestionError(
            f"{quote(name)} is no workload and no service of this configuration"
            f"{_like(name, known)}; name it as NAMESPACE/NAME, HOST, or by its address"
        )
    if len(services) > 1:
        uids = ", ".join(sorted(each.uid for each in services))
        raise QuestionError(f"several services are called {quote(name)}: write one of {uids}")
    return _of_service(off, services[0], address.ANY, port)


def _at(off: Offline, packed: bytes, port: int) -> tuple[Target, ...]:
    # In the order of ztunnel's routes: a service that has the port, then whose address it is.
    services = [off.state.services[uid] for uid in off.state.by_vip.get(packed, ())]
    for service in reversed(services):
        if any(known.number == port for known in service.ports):
            return _of_service(off, service, packed, port)
    workload = off.workload_at(packed)
    if workload is not None:
        return (Target(workload.uid, packed, port),)
    if services:
        return _of_service(off, services[-1], packed, port)
    raise QuestionError(
        f"{address.text(packed)} is no workload's address and no service's: outside the mesh "
        "nobody judges who calls"
    )


def _of_workload(workload: Workload, port: int) -> tuple[Target, ...]:
    if not workload.addresses:
        raise QuestionError(
            f"{workload.uid} has no address that is its own, so that nobody can call it: "
            "nodeagent policy check names the workload that has it"
        )
    return tuple(Target(workload.uid, packed, port) for packed in _addresses(workload))


def _of_service(off: Offline, service: Service, vip: bytes, port: int) -> tuple[Target, ...]:
    if all(known.number != port for known in service.ports):
        ports = ", ".join(str(known.number) for known in service.ports)
        raise QuestionError(f"the service {service.uid} has no port {port}: it has {ports}")
    found = tuple(
        Target(workload.uid if workload is not None else "", target, number)
        for _, workload, target, number in endpoints(off.state, service, vip, port)
    )
    if not found:
        raise QuestionError(f"the service {service.uid} has no endpoint: nothing can be called")
    return found


def _packed(text: str) -> bytes | None:
    try:
        return address.pack(text.removeprefix("[").removesuffix("]"))
    except ValueError:
        return None


def _like(text: str, known: Iterable[str]) -> str:
    """Return the names that may have been meant, as the end of a sentence."""
    found = _meant(text, list(itertools.islice(known, _SCANNED)))
    return f" (did you mean {' or '.join(found)}?)" if found else ""


def _meant(text: str, known: list[str]) -> list[str]:
    wanted = text.casefold()
    # In other letters, or without its namespace: then it is these and no others.
    same = [name for name in known if wanted in {name.casefold(), _bare(name).casefold()}]
    if same:
        return same[:_SUGGESTED]
    # Those of the same namespace first.
    start = text.partition("/")[0] + "/"
    names = sorted(known, key=lambda name: not name.startswith(start))[:_SEARCHED]
    if "/" in text:
        return difflib.get_close_matches(text, names, _SUGGESTED)
    bare = difflib.get_close_matches(text, {_bare(name): None for name in names}, _SUGGESTED)
    return [name for each in bare for name in names if _bare(name) == each][:_SUGGESTED]


def _bare(name: str) -> str:
    return name.rpartition("/")[2]
