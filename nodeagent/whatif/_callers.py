"""Who could tell two configurations apart: callers that stand for all.

This module owns the choice of callers that are asked for. It promises that among them are the
identities of all workloads as far as they fit, every identity, namespace and network that a policy
names, a caller without identity and one of each trust domain whom no policy knows; and that each
has a name for people. It may not judge. Pure.

A verdict depends on a caller by its principal (and the namespace and account in it) and its
address, and on both only by what policies ask of them. So callers of whom no policy says anything
are alike, and one stands for them.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Final

import msgspec

from nodeagent.offline import Offline, pack
from ztunnel.protocol import Attribute, Condition, Workload
from ztunnel.spiffe import SpiffeId, SpiffeIdError

__all__ = ["Caller", "Callers", "Shown"]

SAMPLE: Final = 3
"""Known identities that stand for all which a pattern or a namespace matches, when not all fit."""

UNKNOWN: Final = "nobody-knows"
"""Namespace and account of a caller whom no policy names."""

NOWHERE: Final = ("192.0.2.1", "198.51.100.1", "203.0.113.1")
"""Addresses of documentation (RFC 5737), of which one that no policy names stands for any."""

NOWHERE_IPV6: Final = ("2001:db8::1", "3fff::1", "100::1")
"""The same of IPv6 (RFC 3849, RFC 9637, RFC 6666): no network of IPv4 holds it, however wide."""

_OF_IDENTITY: Final = frozenset(
    {Attribute.PRINCIPAL, Attribute.NAMESPACE, Attribute.SERVICE_ACCOUNT}
)

_SCHEME: Final = "spiffe://"
_STAR: Final = "*"


class Shown(msgspec.Struct, frozen=True):
    """What a caller shows. `identity` is None for plaintext.

    `knows`: it is a workload, and leaves mutual TLS out where DISABLE is in force.
    """

    identity: SpiffeId | None
    source: bytes
    knows: bool = False


class Caller(msgspec.Struct, frozen=True):
    """Somebody who calls, and what he shows under either configuration."""

    name: str
    old: Shown
    new: Shown

    @property
    def moves(self) -> bool:
        """True if it is the caller himself who changes."""
        return self.old.identity != self.new.identity


class Callers:
    """The callers of two configurations."""

    def __init__(self, old: Offline, new: Offline, domains: Iterable[str]) -> None:
        self._domains = sorted(domains)
        probing = [each.settings for each in (old, new) if each.settings.node_plaintext]
        self._probes = sorted({each for found in probing for each in found.node_addresses})
        # By name: replicas have one identity, and of callers without one the address is the name.
        self._by_identity: dict[tuple[str, str], Caller] = {}
        self._by_address: list[Caller] = []
        self._namespaces: dict[str, list[Caller]] = {}
        self._known: dict[tuple[Attribute, str], list[Caller]] = {}
        """Whom a value has been found to match: policies of the mesh are asked for everywhere."""
        for uid in sorted(old.workloads.keys() & new.workloads.keys()):
            self._add(old.workloads[uid], new.workloads[uid])
        self.identities: tuple[Caller, ...] = tuple(self._by_identity.values())
        """Each known identity once, from its first workload's address."""
        self.moving: tuple[Caller, ...] = tuple(each for each in self.identities if each.moves)

    def _add(self, before: Workload, after: Workload) -> None:
        for source, target in zip(_addresses(before), _addresses(after), strict=False):
            one = Shown(_identity(before), source, knows=True)
            two = Shown(_identity(after), target, knows=True)
            caller = Caller(_name(before, after), one, two)
            self._by_address.append(caller)
            if before.identity or after.identity:
                self._by_identity.setdefault((before.identity, after.identity), caller)
        known = self._by_identity.get((before.identity, after.identity))
        if known is not None:
            members = self._namespaces.setdefault(after.namespace, [])
            if not members or members[-1] is not known:
                members.append(known)

    def all_of(self, named: Sequence[Condition]) -> list[Caller]:
        """Return every known caller that `named` could tell apart, and who stands for others."""
        known = self._by_address if _by_source(named) else self.identities
        return [*known, *self._standing(named)]

    def some_of(self, named: Sequence[Condition]) -> list[Caller]:
        """Return callers that stand for those: a few of each kind that `named` speaks of."""
        found: dict[Caller, None] = {}
        for condition in named:
            for value in (*condition.values, *condition.not_values):
                key = (condition.attribute, value)
                if key not in self._known:
                    self._known[key] = self._matching(*key)
                found.update(dict.fromkeys(self._known[key]))
        found.update(dict.fromkeys(self.identities[:SAMPLE]))
        return [*found, *self._standing(named)]

    def without_identity(self, named: Sequence[Condition]) -> list[Caller]:
        """Return the callers without identity that `named` could tell apart."""
        known = self._by_address if _by_source(named) else ()
        return [each for each in (*known, *self._standing(named)) if each.new.identity is None]

    def _matching(self, attribute: Attribute, value: str) -> list[Caller]:
        if attribute not in _OF_IDENTITY:
            return []
        if attribute is Attribute.NAMESPACE and _STAR not in value:
            return self._namespaces.get(value, [])[:SAMPLE]
        if attribute is Attribute.PRINCIPAL and _STAR not in value:
            name = _SCHEME + value
            known = self._by_identity.get((name, name))
            return [known] if known is not None else []
        found: list[Caller] = []
        for caller in self.identities:
            text = _text(caller.new.identity, attribute)
            if text is not None and _fits(value, text):
                found.append(caller)
                if len(found) == SAMPLE:
                    break
        return found

    def _standing(self, named: Sequence[Condition]) -> Iterator[Caller]:
        """Return callers that no workload is, from an address of each kind that `named` knows."""
        identities = dict(self._strangers(named))
        for where, address in _sources(named, self._probes):
            yield _alike(f"a caller without identity{where}", None, address)
            for name, identity in identities.items():
                yield _alike(name + where, identity, address)
        for spelling in self._probes:
            # Under STRICT it may get in where no other address does (`node_plaintext`).
            yield _alike(f"a caller without identity from {spelling}", None, pack(spelling))

    def _strangers(self, named: Sequence[Condition]) -> Iterator[tuple[str, SpiffeId]]:
        """Yield identities that no workload has: one that stands for any, and those named."""
        for domain in self._domains:
            somebody = SpiffeId.workload(domain, UNKNOWN, UNKNOWN)
            yield f"any other identity of {domain}", somebody
        for condition in named:
            for value in (*condition.values, *condition.not_values):
                if _STAR in value:
                    continue
                for text, name in self._principals(condition.attribute, value):
                    identity = _parsed(text)
                    if identity is not None and (text, text) not in self._by_identity:
                        yield name or text, identity

    def _principals(self, attribute: Attribute, value: str) -> Iterator[tuple[str, str]]:
        if attribute is Attribute.PRINCIPAL:
            yield _SCHEME + value, ""
        elif attribute is Attribute.NAMESPACE:
            for domain in self._domains:
                name = f"any other identity of namespace {value} of {domain}"
                yield f"{_SCHEME}{domain}/ns/{value}/sa/{UNKNOWN}", name
        elif attribute is Attribute.SERVICE_ACCOUNT:
            namespace, _, account = value.partition("/")
            for domain in self._domains:
                yield f"{_SCHEME}{domain}/ns/{namespace}/sa/{account}", ""


def _alike(name: str, identity: SpiffeId | None, source: bytes) -> Caller:
    shown = Shown(identity, source)
    return Caller(name, shown, shown)


def _name(before: Workload, after: Workload) -> str:
    if before.identity == after.identity:
        return after.identity or f"{after.uid} (without identity)"
    was, is_ = before.identity or "without identity", after.identity or "without identity"
    return f"{after.uid} ({was}, then {is_})"


def _addresses(workload: Workload) -> tuple[bytes, ...]:
    return tuple(map(pack, workload.addresses)) or (b"",)


def _identity(workload: Workload) -> SpiffeId | None:
    return SpiffeId.parse(workload.identity) if workload.identity else None


def _parsed(text: str) -> SpiffeId | None:
    try:
        return SpiffeId.parse(text)
    except SpiffeIdError:
        return None


def _by_source(named: Iterable[Condition]) -> bool:
    return any(condition.attribute is Attribute.SOURCE_IP for condition in named)


def _text(identity: SpiffeId | None, attribute: Attribute) -> str | None:
    if identity is None:
        return None
    if attribute is Attribute.PRINCIPAL:
        return str(identity).removeprefix(_SCHEME)
    if attribute is Attribute.NAMESPACE:
        return identity.namespace
    if attribute is Attribute.SERVICE_ACCOUNT and identity.namespace is not None:
        return f"{identity.namespace}/{identity.service_account}"
    return None


def _fits(pattern: str, text: str) -> bool:
    if pattern.endswith(_STAR):
        return text.startswith(pattern[:-1])
    if pattern.startswith(_STAR):
        return text.endswith(pattern[1:])
    return text == pattern


def _sources(named: Iterable[Condition], probes: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """Yield an address for each set of named networks that some address lies in, and its name.

    The first one is in none, and none of `probes`, if there is such an address of IPv4; where
    there is not, one of IPv6 is.

    Networks lie in each other or apart. So those that an address lies in are known by the
    narrowest, and one address that lies in no narrower one stands for all that do likewise.
    """
    networks = _networks(named)
    anywhere = _free(NOWHERE, networks, probes)
    yield "", pack(anywhere or NOWHERE[0])
    # All that are in no network are alike: one is enough.
    if not anywhere and (by_ipv6 := _free(NOWHERE_IPV6, networks, probes)):
        yield " by IPv6", pack(by_ipv6)
    for position, network in enumerate(networks):
        address = int(network.network_address)
        # Narrower ones come behind, by where they begin: step over those that are in the way.
        for inner in networks[position + 1 :]:
            if inner.version != network.version or int(inner.network_address) > address:
                break
            address = max(address, int(inner.broadcast_address) + 1)
        if address <= int(network.broadcast_address):
            kind = type(network.network_address)
            yield f" from {network}", pack(str(kind(address)))


def _free(
    spellings: Iterable[str],
    networks: Sequence[ipaddress.IPv4Network | ipaddress.IPv6Network],
    probes: Collection[str],
) -> str:
    """Return an address that is in none of `networks` and none of `probes`, "" without any."""
    return next(
        (
            spelling
            for spelling in spellings
            if spelling not in probes
            and not any(ipaddress.ip_address(spelling) in network for network in networks)
        ),
        "",
    )


def _networks(named: Iterable[Condition]) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    values = {
        value
        for condition in named
        if condition.attribute is Attribute.SOURCE_IP
        for value in (*condition.values, *condition.not_values)
    }
    # What a policy names has been read by the tunnel's own rules: it is a network.
    networks = {ipaddress.ip_network(value, strict=False) for value in values}
    return sorted(
        networks, key=lambda each: (each.version, int(each.network_address), each.prefixlen)
    )
