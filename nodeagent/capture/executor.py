"""One pod's capture at work: reads what is there, does what the plan says, undoes it on failure.

This module owns the order of system calls inside one namespace. It promises that `apply` either
does everything or leaves the namespace as it was, and that nothing it opens outlives `close`. It
decides nothing: plan.py does. All methods block, and run inside the namespace on a thread that is
there, one at a time for each pod.
"""

from __future__ import annotations

import itertools
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, TypeGuard

import msgspec

from nodeagent.capture import _libbpf, actions, netlink_read, netlink_write, older
from nodeagent.capture import plan as planning
from nodeagent.capture.layout import PORTS, SETTINGS_SIZE, SLOTS, pack_config, pack_settings
from nodeagent.capture.listeners import PortTakenError, is_listening, open_listener, sock_cookie
from nodeagent.capture.model import Enforcement, OlderCaller
from nodeagent.capture.objects import PodObjects, Record
from nodeagent.capture.shared import CLOSED
from nodeagent.capture.sysctls import Sysctls
from nodeagent.pods import NetnsHandle
from nodeagent.pods.interfaces import collect_interfaces
from nodeagent.pods.netlink import Rtnetlink

__all__ = ["PodExecutor"]

IPV6_ON_LO: Final = "ipv6/conf/lo/disable_ipv6"
CHOSEN_PORTS: Final = "ipv4/ip_local_port_range"


class PodExecutor:
    """The capture of one pod. `marker` returns the descriptor of the iterator program."""

    def __init__(
        self,
        uid: str,
        netns: NetnsHandle,
        addresses: tuple[str, ...],
        enforcement: Enforcement | None,
        objects: PodObjects,
        marker: Callable[[], int | None],
    ) -> None:
        self.uid = uid
        self.netns = netns
        self.addresses = addresses
        self.enforcement = enforcement
        self.objects = objects
        self.listeners: list[socket.socket | None] = [None] * SLOTS
        self._marker = marker
        self._sysctls = Sysctls()
        self._connected = False
        self._older = True
        """Whether there may be connections that carry the mark of older ones."""
        self._local: tuple[str, ...] = addresses

    # --- reading ---

    def read(self, route: Rtnetlink) -> planning.Found:
        """Return what the namespace and the pins have now. Raises OSError."""
        interfaces = collect_interfaces(route)
        self._local = planning.local_addresses(self.addresses, interfaces)
        clsact = netlink_read.read_clsact(route)
        capture, programs = self.objects.program_ids()
        return planning.Found(
            interfaces=interfaces,
            families=self._families(),
            rules=netlink_read.read_rules(route),
            routes=netlink_read.read_routes(route),
            sysctls={
                name: self._sysctls.read(name) for name in planning.wanted_sysctls(interfaces)
            },
            clsact=clsact,
            filters=netlink_read.read_filters(route, clsact),
            link=self.objects.link(),
            capture=capture,
            programs=programs,
            slots=self.objects.slots(),
            listening=tuple(None if s is None else is_listening(s) for s in self.listeners),
            settings=self.objects.settings(),
            number=self.objects.number(),
            connected=self._connected,
        )

    def _families(self) -> frozenset[int]:
        usable = {int(socket.AF_INET)}
        if self._sysctls.read(IPV6_ON_LO) == "0":
            usable.add(int(socket.AF_INET6))
        return frozenset(usable)

    def wanted(self, found: planning.Found) -> planning.Wanted:
        """Return what enrolment should leave. An unknown enforcement stays as it is in force."""
        return planning.Wanted(
            addresses=self.addresses,
            settings=self._body(self.settings() or found.settings[:SETTINGS_SIZE] or CLOSED),
            sockets=tuple(0 if s is None else sock_cookie(s) for s in self.listeners),
        )

    def settings(self) -> bytes:
        """Return which ports are strict for the enforcement, empty while that is unknown."""
        if self.enforcement is None:
            return b""
        return pack_settings(
            strict_default=self.enforcement.strict_default,
            exceptions=self.enforcement.exceptions(),
        )

    def _body(self, settings: bytes) -> bytes:
        return settings + pack_config(self._local)

    def enforce(self) -> None:
        """Put the enforcement in force, of the addresses that were read last."""
        self.objects.write_settings(self._body(self.settings()))

    def note_connections(self, *, fresh: bool) -> None:
        """Look whether there are TCP sockets, before the first of ours is opened.

        `fresh` says that nothing of the pod has been captured yet.
        """
        self._connected = older.connected()
        if fresh:
            # Only `MarkOlder` gives that mark.
            self._older = False

    def remember(self, found: planning.Found) -> None:
        """Pin a record of the namespace as it is before anything is changed, and the maps.

        What an existing record says of the time before stays; devices that came later are added.
        """
        names = {device.index: device.name for device in found.interfaces.devices}
        sysctls = {name: value for name, value in found.sysctls.items() if value}
        clsact = frozenset(names[i] for i in found.clsact if i in names)
        old = self.objects.record()
        if old is not None:
            clsact = old.clsact | {
                name for name in clsact if f"ipv4/conf/{name}/rp_filter" not in old.sysctls
            }
            sysctls |= old.sysctls
        record = Record(
            uid=self.uid,
            netns_cookie=self.netns.cookie,
            netns_path=str(self.netns.path),
            addresses=self.addresses,
            sysctls=sysctls,
            clsact=clsact,
        )
        number = self.objects.number()
        if not number or msgspec.structs.replace(record, number=number) != old:
            self.objects.create(record)

    # --- doing ---

    def apply(self, steps: Iterable[actions.Action]) -> None:
        """Do all, or undo what was done and raise the first error. Raises PortTakenError too."""
        done: list[actions.Action] = []
        try:
            for action, error in self._each(steps):
                if error is not None:
                    raise error
                done.append(action)
        except (OSError, PortTakenError) as error:
            undo = [actions.inverse(action) for action in reversed(done)]
            for action, second in self._each(step for step in undo if step is not None):
                if second is not None:
                    error.add_note(f"could not be undone: {action}: {second}")
            raise

    def _each(
        self, steps: Iterable[actions.Action]
    ) -> Iterator[tuple[actions.Action, OSError | None]]:
        """Do all, whatever fails, and yield each with its error. Those that were done come first
        within each group that is sent to the kernel together.
        """
        for is_netlink, group in itertools.groupby(steps, _is_netlink):
            if is_netlink:
                batch = [action for action in group if _is_netlink(action)]
                results = list(zip(batch, self.write(batch), strict=True))
                yield from sorted(results, key=lambda result: result[1] is not None)
                continue
            for action in group:
                try:
                    self.do(action)
                except OSError as error:
                    yield action, error
                else:
                    yield action, None

    def write(self, batch: Sequence[actions.NetlinkAction]) -> list[OSError | None]:
        """Make changes of routing and filters together. Raises OSError if a program is refused."""
        return netlink_write.write(
            [
                (
                    action,
                    self.objects.guard(action.direction)
                    if isinstance(action, actions.AddFilter)
                    else None,
                )
                for action in batch
            ]
        )

    def do(self, action: actions.Action) -> None:
        """Do one thing that netlink has no part in. Raises OSError, PortTakenError."""
        match action:
            case actions.OpenListener(slot):
                self._open(slot)
            case actions.FillSlot(slot):
                listener = self.listeners[slot]
                if listener is not None:
                    self.objects.fill_slot(slot, listener.fileno())
            case actions.WriteSettings(value):
                self.objects.write_settings(value)
            case actions.SetSysctl(name, value):
                self._sysctls.write(name, value)
            case actions.AttachLink():
                self.objects.attach(self.netns.fd)
            case actions.Detach():
                self.objects.detach()
            case actions.MarkOlder():
                marker = self._marker()
                if marker is not None:
                    self._older = True
                    _libbpf.run_iterator(marker)

    def prune(self) -> None:
        """Unpin programs that were replaced; call after a whole `apply`."""
        self.objects.prune()

    def cut(self) -> int:
        """End older connections on ports that take mutual TLS only. Returns how many."""
        if not self._older or self.enforcement is None or not self.enforcement.any_strict:
            return 0
        done = older.cut(frozenset(self._local), self.enforcement.is_strict)
        self._older = done.left > 0
        return done.ended

    def older_callers(self) -> tuple[OlderCaller, ...]:
        """Return who is connected since before the capture, as of what was read last."""
        if not self._older:
            return ()
        least, most = map(int, self._sysctls.read(CHOSEN_PORTS).split())
        found, self._older = older.look(frozenset(self._local), range(least, most + 1))
        return found

    def _open(self, slot: int) -> None:
        opened = open_listener(PORTS[slot])
        old, self.listeners[slot] = self.listeners[slot], opened
        if old is not None:
            old.close()

    def release_listeners(self) -> None:
        """Close the listening sockets; the kernel empties their slots."""
        for sock in self.listeners:
            if sock is not None:
                sock.close()
        self.listeners = [None] * SLOTS

    def rest(self) -> None:
        """Close what a visit has opened: opened again in microseconds; kept, nine descriptors."""
        self.objects.close()
        self._sysctls.close()

    def close(self) -> None:
        """Close sockets, descriptors and the namespace; the capture stays."""
        self.release_listeners()
        self.rest()
        self.netns.close()

    # --- removing ---

    def remove(self) -> None:
        """Take everything out of the namespace. Goes on after errors, and then raises them all.

        The pins, and with them the record, stay until the rest has succeeded.
        """
        record = self.objects.record()
        errors: list[OSError] = []
        with Rtnetlink() as route:
            found = self.read(route)
            before = dict(record.sysctls) if record else {}
            clsact = record.clsact if record else frozenset()
        for _, error in self._each(planning.removal(found, before, clsact)):
            if error is not None:
                errors.append(error)
        if errors:
            raise ExceptionGroup(f"pod {self.uid} could not be released completely", errors)
        self.objects.remove()
        self.close()


def _is_netlink(action: actions.Action) -> TypeGuard[actions.NetlinkAction]:
    return isinstance(action, actions.NetlinkAction)
