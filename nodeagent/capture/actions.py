"""What there is in a pod's namespace, and the single things that can be done to it: values only.

This module owns the vocabulary that the plan and the executor share: rules, routes, filters, and
one action for each change, with what undoes it. It promises that two values are equal when they
mean the same to the kernel. It may not touch the kernel, and decides nothing.
"""

from __future__ import annotations

from typing import Final

import msgspec

from nodeagent.capture.layout import PORTS, TABLE, V6
from nodeagent.pods.values import LO_INDEX, Device

__all__ = [
    "DIRECTIONS",
    "EGRESS",
    "FILTER_HANDLE",
    "FILTER_NAME",
    "FILTER_PRIORITY",
    "INGRESS",
    "JUMP",
    "KINDS",
    "LOOKUP",
    "NOTHING",
    "PREFERENCES",
    "TCP",
    "Action",
    "AddClsact",
    "AddFilter",
    "AddRoute",
    "AddRule",
    "AttachLink",
    "DeleteClsact",
    "DeleteFilter",
    "DeleteRoute",
    "DeleteRule",
    "Detach",
    "FillSlot",
    "Filter",
    "MarkOlder",
    "NetlinkAction",
    "OpenListener",
    "Route",
    "Rule",
    "SetSysctl",
    "WriteSettings",
    "inverse",
]

EGRESS: Final = "egress"
INGRESS: Final = "ingress"
DIRECTIONS: Final = (EGRESS, INGRESS)

LOOKUP: Final = 1
JUMP: Final = 2
NOTHING: Final = 3
"""Actions of rules: FR_ACT_TO_TBL, FR_ACT_GOTO, FR_ACT_NOP (linux/fib_rules.h)."""

PREFERENCES: Final = range(98, 103)
"""Priorities of our rules: nobody else's may be there."""

TCP: Final = 6

FILTER_PRIORITY: Final = 1
FILTER_HANDLE: Final = 1
"""The guard comes before any filter of others, and lets them see what it passes."""

FILTER_NAME: Final = "nodeagent"


class Rule(msgspec.Struct, frozen=True, order=True):
    """A policy routing rule. `other` describes selectors and flags that ours never have.

    `table` is 0 unless the action is a lookup, `target` 0 unless it is a jump.
    """

    family: int
    preference: int
    action: int
    table: int = 0
    target: int = 0
    mark: int = 0
    mask: int = 0
    interface: str = ""
    protocol: int = 0
    other: str = ""

    @property
    def diverts(self) -> bool:
        """Whether it turns the pod's own connections to the tunnel."""
        return self.table == TABLE and not self.mask

    def __str__(self) -> str:
        family = "-6 " if self.family == V6 else ""
        mark = f" fwmark {self.mark:#x}" if self.mask else ""
        protocol = f" ipproto {self.protocol}" if self.protocol else ""
        where = f" table {self.table}" if self.table else ""
        jump = f" goto {self.target}" if self.target else ""
        other = f" {self.other}" if self.other else ""
        return f"{family}rule {self.preference}:{mark}{protocol}{where}{jump}{other}"


class Route(msgspec.Struct, frozen=True, order=True):
    """A route of our table. Ours are of type local, to everywhere, through `lo`."""

    family: int
    source: str
    device: int = LO_INDEX
    destination: str = "default"
    kind: int = 2  # RTN_LOCAL

    def __str__(self) -> str:
        family = "-6 " if self.family == V6 else ""
        return f"{family}route {self.destination} src {self.source} table {TABLE}"


class Filter(msgspec.Struct, frozen=True, order=True):
    """A tc filter of type bpf on a device."""

    device: int
    direction: str
    priority: int
    handle: int
    name: str
    program: int
    pod: int = 0
    """The class id: which pod the program is to take it for."""

    @property
    def is_in_place(self) -> bool:
        """Whether it stands where ours belongs."""
        return (self.priority, self.handle) == (FILTER_PRIORITY, FILTER_HANDLE)

    @property
    def is_ours(self) -> bool:
        """Whether it stands in our place, or carries our name."""
        return self.is_in_place or self.name == FILTER_NAME


# --- actions, each done and undone by the executor ---------------------------------------------


class OpenListener(msgspec.Struct, frozen=True):
    slot: int

    def __str__(self) -> str:
        return f"no socket listens on port {PORTS[self.slot]}"


class FillSlot(msgspec.Struct, frozen=True):
    slot: int

    def __str__(self) -> str:
        return f"the capture's slot for port {PORTS[self.slot]} has not our socket"


class WriteSettings(msgspec.Struct, frozen=True):
    value: bytes
    before: bytes

    def __str__(self) -> str:
        return "the guard's settings are not those in force"


class SetSysctl(msgspec.Struct, frozen=True):
    name: str
    value: str
    before: str

    def __str__(self) -> str:
        return f"sysctl {self.name} is {self.before}, not {self.value}"


class AttachLink(msgspec.Struct, frozen=True):
    def __str__(self) -> str:
        return "the capture program is not attached, or another one is"


class Detach(msgspec.Struct, frozen=True):
    def __str__(self) -> str:
        return "the capture program is attached"


class AddRule(msgspec.Struct, frozen=True):
    rule: Rule

    def __str__(self) -> str:
        return f"{self.rule} is missing"


class DeleteRule(msgspec.Struct, frozen=True):
    rule: Rule

    def __str__(self) -> str:
        return f"{self.rule} does not belong there"


class AddRoute(msgspec.Struct, frozen=True):
    route: Route

    def __str__(self) -> str:
        return f"{self.route} is missing"


class DeleteRoute(msgspec.Struct, frozen=True):
    route: Route

    def __str__(self) -> str:
        return f"{self.route} does not belong there"


class MarkOlder(msgspec.Struct, frozen=True):
    def __str__(self) -> str:
        return "connections older than the enrolment are not marked"


class AddClsact(msgspec.Struct, frozen=True):
    device: Device

    def __str__(self) -> str:
        return f"device {self.device.name} has no clsact qdisc"


class DeleteClsact(msgspec.Struct, frozen=True):
    device: int

    def __str__(self) -> str:
        return f"device {self.device} has our clsact qdisc"


class AddFilter(msgspec.Struct, frozen=True):
    device: Device
    direction: str

    def __str__(self) -> str:
        return f"device {self.device.name} has no {self.direction} guard"


class DeleteFilter(msgspec.Struct, frozen=True):
    filter: Filter

    def __str__(self) -> str:
        return f"device {self.filter.device} has a wrong {self.filter.direction} filter"


NetlinkAction = (
    AddRule
    | DeleteRule
    | AddRoute
    | DeleteRoute
    | AddClsact
    | DeleteClsact
    | AddFilter
    | DeleteFilter
)

Action = (
    OpenListener
    | FillSlot
    | WriteSettings
    | SetSysctl
    | AttachLink
    | Detach
    | MarkOlder
    | NetlinkAction
)


def inverse(action: Action) -> Action | None:
    """Return what undoes `action`, None if nothing needs to.

    Marks on older connections stay: without our rules they mean nothing. Sockets and the pinned
    directory are the executor's to close.
    """
    match action:
        case SetSysctl(name, value, before):
            return SetSysctl(name, before, value)
        case WriteSettings(value, before):
            return WriteSettings(before, value) if before else None
        case AttachLink():
            return Detach()
        case AddRule(rule):
            return DeleteRule(rule)
        case DeleteRule(rule):
            return AddRule(rule)
        case AddRoute(route):
            return DeleteRoute(route)
        case DeleteRoute(route):
            return AddRoute(route)
        case AddClsact(device):
            return DeleteClsact(device.index)
        case AddFilter(device, direction):
            return DeleteFilter(
                Filter(device.index, direction, FILTER_PRIORITY, FILTER_HANDLE, FILTER_NAME, 0)
            )
        case _:
            return None


KINDS: Final[dict[type, str]] = {
    OpenListener: "listener_lost",
    FillSlot: "slot_wrong",
    WriteSettings: "guard_settings",
    SetSysctl: "sysctl_changed",
    AttachLink: "program_detached",
    AddRule: "rule_missing",
    DeleteRule: "rule_foreign",
    AddRoute: "route_missing",
    DeleteRoute: "route_foreign",
    MarkOlder: "older_unmarked",
    AddClsact: "guard_missing",
    AddFilter: "guard_missing",
    DeleteFilter: "guard_foreign",
}
"""Stable tokens for deviations, by the action that puts them right."""
