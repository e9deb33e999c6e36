"""What has to change in a pod's namespace: a pure comparison of what is wanted and what is found.

This module owns every decision about rules, routes, sysctls, filters, links and slots. It promises
that the order of the returned actions is safe to stop at after any of them (docs/capture.md,
"Order"), that an empty plan means healthy, and that the same inputs give the same plan. It may not
touch the kernel.
"""

from __future__ import annotations

import ipaddress

import msgspec

from nodeagent.capture.actions import (
    DIRECTIONS,
    FILTER_HANDLE,
    FILTER_NAME,
    FILTER_PRIORITY,
    JUMP,
    LOOKUP,
    NOTHING,
    PREFERENCES,
    TCP,
    Action,
    AddClsact,
    AddFilter,
    AddRoute,
    AddRule,
    AttachLink,
    DeleteClsact,
    DeleteFilter,
    DeleteRoute,
    DeleteRule,
    Detach,
    FillSlot,
    Filter,
    MarkOlder,
    OpenListener,
    Route,
    Rule,
    SetSysctl,
    WriteSettings,
)
from nodeagent.capture.layout import (
    MARK_DELIVERY,
    MARK_OLDER,
    MARK_TUNNEL,
    SLOTS,
    TABLE,
    V4,
    V6,
)
from nodeagent.pods.values import Interfaces

__all__ = [
    "Found",
    "Wanted",
    "conflicts",
    "foreign_rules",
    "local_addresses",
    "plan",
    "removal",
    "wanted_routes",
    "wanted_rules",
    "wanted_sysctls",
]


class Found(msgspec.Struct, frozen=True):
    """What the kernel has, read in one go.

    `rules` are those of our priorities or our table, and any that come before ours. `programs`
    maps direction to the id of the pinned guard program, 0 when there is none. `link` is the id of
    the attached capture program, 0 when there is no attached link; `capture` that of the pinned
    one. `slots` are socket cookies, 0 for an empty slot. `listening` says for each of our own
    listening sockets whether it still listens, None when we hold none.
    """

    interfaces: Interfaces
    families: frozenset[int]
    rules: frozenset[Rule]
    routes: frozenset[Route]
    sysctls: dict[str, str]
    clsact: frozenset[int]
    filters: frozenset[Filter]
    link: int = 0
    capture: int = 0
    programs: dict[str, int] = {}
    slots: tuple[int, ...] = (0,) * SLOTS
    listening: tuple[bool | None, ...] = (None,) * SLOTS
    settings: bytes = b""
    number: int = 0
    """The pod's in the shared maps, 0 if it has none yet."""
    connected: bool = False
    """Whether the namespace has TCP sockets besides ours."""


class Wanted(msgspec.Struct, frozen=True):
    """What enrolment should leave. `sockets` are the cookies of our listeners, 0 if not ours."""

    addresses: tuple[str, ...]
    settings: bytes
    sockets: tuple[int, ...]


# --- what is wanted ----------------------------------------------------------------------------


def _family(address: str) -> int:
    four = ipaddress.ip_address(address).version == 4  # noqa: PLR2004 - of IP
    return V4 if four else V6


def local_addresses(workload: tuple[str, ...], interfaces: Interfaces) -> tuple[str, ...]:
    """Return the workload's addresses, in their order, then the namespace's others, sorted."""
    others = {address.text for address in interfaces.addresses} - set(workload)
    return (*workload, *sorted(others))


def wanted_rules(family: int) -> tuple[Rule, ...]:
    """Return the rules of one family, the one that turns connections away last.

    Marked sockets jump behind it and follow the pod's own routing from there, whatever that is; if
    it has no route for them they fail, and do not come back to the tunnel. A rule with `not` would
    be shorter, and wrong: it inverts all selectors at once, and turns UDP away as well.
    """
    full = 0xFFFFFFFF
    end = PREFERENCES[-1]

    def marked(preference: int, mark: int, action: int, table: int, target: int) -> Rule:
        return Rule(family, preference, action, table, target, mark, full, interface="lo")

    return (
        Rule(family, end, NOTHING),
        marked(98, MARK_OLDER, JUMP, 0, end),
        marked(99, MARK_DELIVERY, LOOKUP, TABLE, 0),
        marked(100, MARK_TUNNEL, JUMP, 0, end),
        Rule(family, 101, LOOKUP, TABLE, interface="lo", protocol=TCP),
    )


def wanted_routes(addresses: tuple[str, ...], families: frozenset[int]) -> tuple[Route, ...]:
    """Return one route for each usable family that the pod has an address of.

    A family without one has no rules either: a connection attempt there fails at once, as it did
    before, instead of being taken by a tunnel that cannot go on. The guard still covers it.
    """
    first: dict[int, str] = {}
    for address in addresses:
        first.setdefault(_family(address), address)
    return tuple(Route(f, source) for f, source in first.items() if f in families)


def wanted_sysctls(interfaces: Interfaces) -> dict[str, str]:
    """Return the sysctls that the capture needs, by name relative to /proc/sys/net.

    The kernel's reset for a closed port belongs to no socket: only `fwmark_reflect` gives it the
    mark that brings it back to the tunnel, which would wait for its deadline otherwise.
    """
    names = ["all", "default", "lo", *(device.name for device in interfaces.devices)]
    values = {f"ipv4/conf/{name}/rp_filter": "0" for name in names}
    return values | {
        "ipv4/conf/all/accept_local": "1",
        "ipv4/tcp_fwmark_accept": "1",
        "ipv4/fwmark_reflect": "1",
        "ipv6/fwmark_reflect": "1",
    }


def conflicts(found: Found) -> list[str]:
    """Return what others have put where ours would go, in words; empty when nothing."""
    ours = {rule for family in (V4, V6) for rule in wanted_rules(family)}
    rules = [f"{rule}" for rule in sorted(found.rules - ours) if rule.preference in PREFERENCES]
    rules += [f"{rule}" for rule in sorted(found.rules - ours) if rule.table == TABLE]
    routes = [f"{route}" for route in sorted(found.routes) if not _may_be_ours(route)]
    filters = [
        f"tc filter {item.name or item.handle} on device {item.device} ({item.direction})"
        for item in sorted(found.filters)
        if item.is_ours and item.name != FILTER_NAME
    ]
    return list(dict.fromkeys([*rules, *routes, *filters]))


def _may_be_ours(route: Route) -> bool:
    return route == Route(route.family, route.source)


# --- the comparison ----------------------------------------------------------------------------


def plan(wanted: Wanted, found: Found) -> list[Action]:
    """Return what to do, in order. Rules that come before ours are reported, never deleted."""
    actions: list[Action] = []
    actions += _sockets(wanted, found)
    for name, value in wanted_sysctls(found.interfaces).items():
        before = found.sysctls.get(name, "")
        if before not in ("", value):
            actions.append(SetSysctl(name, value, before))
    if not found.link or found.link != found.capture:
        actions.append(AttachLink())
    actions += _routing(wanted, found)
    actions += _guard(found)
    return actions


def _sockets(wanted: Wanted, found: Found) -> list[Action]:
    actions: list[Action] = []
    for slot in range(SLOTS):
        held = found.listening[slot]
        lost = held is None and not found.slots[slot]
        if held is False or lost:
            actions += [OpenListener(slot), FillSlot(slot)]
        elif held and found.slots[slot] != wanted.sockets[slot]:
            actions.append(FillSlot(slot))
    if found.settings != wanted.settings:
        actions.append(WriteSettings(wanted.settings, found.settings))
    return actions


def _routing(wanted: Wanted, found: Found) -> list[Action]:
    addresses = local_addresses(wanted.addresses, found.interfaces)
    routes = wanted_routes(addresses, found.families)
    rules = [rule for route in routes for rule in wanted_rules(route.family)]
    actions: list[Action] = [
        DeleteRule(rule)
        for rule in sorted(found.rules - set(rules))
        if rule.preference in PREFERENCES or rule.table == TABLE
    ]
    actions += [DeleteRoute(route) for route in sorted(found.routes - set(routes))]
    actions += [AddRoute(route) for route in routes if route not in found.routes]
    missing = [rule for rule in rules if rule not in found.rules]
    diverting = [rule for rule in missing if rule.diverts]
    actions += [AddRule(rule) for rule in missing if not rule.diverts]
    # Once the guard is there no connection of the pod can be older than the enrolment.
    if diverting and found.connected and not any(item.is_ours for item in found.filters):
        actions.append(MarkOlder())
    actions += [AddRule(rule) for rule in diverting]
    return actions


def _guard(found: Found) -> list[Action]:
    actions: list[Action] = []
    for device in found.interfaces.devices:
        if device.index not in found.clsact:
            actions.append(AddClsact(device))
        for direction in DIRECTIONS:
            here = [
                item
                for item in sorted(found.filters)
                if (item.device, item.direction) == (device.index, direction) and item.is_ours
            ]
            right = Filter(
                device.index,
                direction,
                FILTER_PRIORITY,
                FILTER_HANDLE,
                FILTER_NAME,
                found.programs.get(direction, 0),
                found.number,
            )
            # In our place a wrong program is replaced, without a moment of none.
            actions += [DeleteFilter(item) for item in here if not item.is_in_place]
            if right not in here:
                actions.append(AddFilter(device, direction))
    return actions


def removal(found: Found, before: dict[str, str], clsact_before: frozenset[str]) -> list[Action]:
    """Return what takes our things out of the namespace again.

    `before` are the sysctls as they were found; one that somebody has changed since stays as it is.
    `clsact_before` names the devices that had a clsact qdisc before. The guard goes first, so that
    new connections are not dropped between two steps; the rule that turns traffic away next.
    """
    actions: list[Action] = [DeleteFilter(item) for item in sorted(found.filters) if item.is_ours]
    others = {item.device for item in found.filters if not item.is_ours}
    names = {device.index: device.name for device in found.interfaces.devices}
    for index in sorted(found.clsact):
        if names.get(index) not in clsact_before and index not in others:
            actions.append(DeleteClsact(index))
    ours = {rule for family in (V4, V6) for rule in wanted_rules(family)}
    actions += [
        DeleteRule(rule)
        for rule in sorted(found.rules & ours, key=lambda rule: (not rule.diverts, rule))
    ]
    actions += [DeleteRoute(route) for route in sorted(found.routes) if _may_be_ours(route)]
    if found.link:
        actions.append(Detach())
    values = wanted_sysctls(found.interfaces)
    for name, old in before.items():
        ours_now = values.get(name)
        if ours_now not in (None, old) and found.sysctls.get(name) == ours_now:
            actions.append(SetSysctl(name, old, ours_now))
    return actions


def foreign_rules(found: Found) -> list[Rule]:
    """Return rules of others that come before ours: they may turn TCP past the tunnel.

    The guard drops what they turn; they may also be somebody's legitimate routing.
    """
    return [rule for rule in sorted(found.rules) if 0 < rule.preference < PREFERENCES.start]
