"""Two configurations compared by what they decide, for callers that stand for all.

This module owns the comparison. It promises that a workload which both judge by the same rules is
asked about only for callers who themselves change; that callers, ports and workloads with the same
change are one entry; and that the number of judgements and of entries is bounded, with what was
left out counted. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from nodeagent.offline import OWN_PORTS, Offline, Verdict, pack
from nodeagent.whatif._callers import Caller, Callers, Shown
from nodeagent.whatif._model import CallChange, Comparison, ModeChange, Side
from nodeagent.whatif._places import Place, conditions, places
from ztunnel.protocol import Attribute, Condition, Mode

__all__ = ["ALL_PORTS", "NOT_JUDGED", "OTHER_PORTS", "compare", "side"]

MAX_JUDGED: Final = 150_000
"""Pairs of judgements, about 40 µs each: six seconds."""

MAX_LISTED: Final = 2_000
"""Entries of each list, the first by workload: a megabyte of JSON or two."""

ALL_PORTS: Final = "all"
OTHER_PORTS: Final = "other"

FIRST_OTHER: Final = 1
"""From which on a port is looked for that no policy names."""

NOT_JUDGED: Final = Side(allowed=True, judged=False)
"""Where no agent judges, everybody gets in."""


_Outcome = tuple[Side, Side]


class _Change(NamedTuple):
    """What becomes of calls to some ports of a place, by its first workload."""

    outcome: _Outcome
    ports: tuple[str, ...]
    first: str


def compare(old: Offline, new: Offline, domains: Iterable[str]) -> Comparison:
    """Return how `new` differs from `old`. `domains` are the trust domains that both trust."""
    found = places(old, new)
    callers = Callers(old, new, domains)
    calls = _Calls(found, callers, lambda uid: _addresses(old, new, uid))
    changed: dict[_Change, dict[str, None]] = {}
    for place, caller, ports in calls.all():
        by_outcome: dict[_Outcome, list[str]] = {}
        for port in ports:
            outcome = (
                _side(old, place, caller.old, port),
                _side(new, place, caller.new, port),
            )
            if outcome[0].allowed != outcome[1].allowed:
                by_outcome.setdefault(outcome, []).append(port.name)
        for outcome, some in by_outcome.items():
            named = (ALL_PORTS,) if len(some) == len(ports) else tuple(some)
            change = _Change(outcome, named, place.workloads[0])
            # Replicas have one name, and are several callers where addresses count.
            changed.setdefault(change, {})[caller.name] = None
    changes = _merged(changed, {place.workloads[0]: place.workloads for place in found})
    refused = [each for each in changes if each.old.allowed]
    admitted = [each for each in changes if not each.old.allowed]
    modes = _modes(old, new, found)
    lists = (refused, admitted, modes)
    return Comparison(
        modes=tuple(modes[:MAX_LISTED]),
        refused=tuple(refused[:MAX_LISTED]),
        admitted=tuple(admitted[:MAX_LISTED]),
        workloads_added=tuple(sorted(new.workloads.keys() - old.workloads.keys())),
        workloads_removed=tuple(sorted(old.workloads.keys() - new.workloads.keys())),
        sampled=calls.sampled,
        unlooked=calls.unlooked,
        left_out=sum(max(0, len(each) - MAX_LISTED) for each in lists),
    )


class _Port(NamedTuple):
    """What is called. `address` is None where it makes no difference which."""

    name: str
    number: int
    address: bytes | None


class _Calls:
    """Which calls are asked about, within the bound. `addresses` are those of a workload."""

    def __init__(
        self,
        found: Sequence[Place],
        callers: Callers,
        addresses: Callable[[str], Sequence[str]],
    ) -> None:
        self._places = found
        self._callers = callers
        self._addresses = addresses
        self._left = MAX_JUDGED
        changing = sum(place.tells_identities_apart for place in found)
        # Twice the identities: as many callers again that stand for others, or ports.
        self.sampled = changing * 2 * len(callers.identities) > MAX_JUDGED
        self.unlooked = 0

    def all(self) -> Iterator[tuple[Place, Caller, Sequence[_Port]]]:
        """Yield place, caller and ports to ask about."""
        for place in self._places:
            named = list(conditions(place.policies))
            others: Sequence[Caller] = ()
            if place.tells_identities_apart:
                some = self._callers.some_of if self.sampled else self._callers.all_of
                others = some(named)
            elif place.changes:
                # Nobody who proves an identity is let in or refused by any other mode.
                others = self._callers.without_identity(named)
            callers = dict.fromkeys((*self._callers.moving, *others))
            ports = self._ports(place, named)
            for position, caller in enumerate(callers):
                if self._left < len(ports):
                    self.unlooked += len(callers) - position
                    break
                self._left -= len(ports)
                yield place, caller, ports

    def _ports(self, place: Place, named: Sequence[Condition]) -> Sequence[_Port]:
        ports = _ports(place, named)
        if not any(condition.attribute is Attribute.DESTINATION_IP for condition in named):
            return ports
        addresses = self._addresses(place.workloads[0])
        return [
            _Port(f"{port.name} at {spelling}", port.number, pack(spelling))
            for port in ports
            for spelling in addresses
        ]


def _addresses(old: Offline, new: Offline, uid: str) -> Sequence[str]:
    """Return the addresses that a workload has in both."""
    kept = new.workloads[uid].addresses
    return [spelling for spelling in old.workloads[uid].addresses if spelling in kept]


def _ports(place: Place, named: Sequence[Condition]) -> Sequence[_Port]:
    """Return the ports that the rules of a place could tell apart, and one for all others."""
    modes = (*place.old.port_modes, *place.new.port_modes)
    numbers = {port for port, _ in modes} | {
        int(value)
        for condition in named
        if condition.attribute is Attribute.DESTINATION_PORT
        for value in (*condition.values, *condition.not_values)
    }
    other = FIRST_OTHER
    while other in numbers or other in OWN_PORTS:
        other += 1
    known = [_Port(str(port), port, None) for port in sorted(numbers - OWN_PORTS)]
    return [*known, _Port(OTHER_PORTS, other, None)]


def _side(off: Offline, place: Place, shown: Shown, port: _Port) -> Side:
    uid = place.workloads[0]
    identity = off.shown(uid, port.number, shown.identity) if shown.knows else shown.identity
    verdict = off.judge(uid, port.number, identity, shown.source, port.address)
    return side(verdict)


def side(verdict: Verdict | None) -> Side:
    """Return what a report says of a verdict; None is that of nobody."""
    if verdict is None:
        return NOT_JUDGED
    reason = "" if verdict.allow else verdict.reason.value
    return Side(allowed=verdict.allow, reason=reason, origin=verdict.origin)


def _merged(
    changed: Mapping[_Change, Iterable[str]], workloads: Mapping[str, tuple[str, ...]]
) -> list[CallChange]:
    """Return one entry for the same callers, ports and outcome, with all workloads."""
    merged: dict[tuple[_Outcome, tuple[str, ...], tuple[str, ...]], list[str]] = {}
    for change, callers in changed.items():
        key = (change.outcome, change.ports, tuple(callers))
        merged.setdefault(key, []).extend(workloads[change.first])
    found = [
        CallChange(
            callers=callers,
            workloads=tuple(sorted(called)),
            ports=ports,
            old=outcome[0],
            new=outcome[1],
        )
        for (outcome, ports, callers), called in merged.items()
    ]
    return sorted(found, key=lambda each: (each.workloads, each.ports, each.callers))


def _modes(old: Offline, new: Offline, found: Iterable[Place]) -> list[ModeChange]:
    """Return the modes that change, of workloads that both configurations have in the mesh."""
    merged: dict[tuple[str, str, str, str], list[str]] = {}
    for place in found:
        if not (place.changes and place.old.judged and place.new.judged):
            continue
        ports = {port for port, _ in (*place.old.port_modes, *place.new.port_modes)}
        for uid in place.workloads:
            for port in (0, *sorted(ports)):
                before, _ = _mode(old, uid, port)
                after, origin = _mode(new, uid, port)
                if before is not after:
                    key = (str(port or ""), before.value, after.value, origin)
                    merged.setdefault(key, []).append(uid)
    found_modes = [
        ModeChange(workloads=tuple(sorted(uids)), port=port, old=was, new=then, origin=origin)
        for (port, was, then, origin), uids in merged.items()
    ]
    return sorted(found_modes, key=lambda each: (each.workloads, each.port))


def _mode(off: Offline, uid: str, port: int) -> tuple[Mode, str]:
    policy = off.state.policies[uid]
    return policy.port_modes.get(port, policy.mode), policy.port_origins.get(port, policy.origin)
