"""Services: virtual addresses and ports, and the endpoints behind them.

This module owns the reading of ServiceEntries as a set. It promises that a pair of virtual address
and port belongs to at most one service, and that no service takes over the address of a workload of
another namespace or of the node. It may not decide which endpoint a connection goes to.

A conflict over an address is settled in favour of the oldest ServiceEntry, then of the lower uid;
the loser loses that address and keeps the rest. Several hosts of one entry are one service each;
the first one has the addresses, for the endpoints are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from nodeagent.api import (
    ConfigWarning,
    PortProtocol,
    Resolution,
    ServiceEntry,
    ServiceEntryEndpoint,
    ServiceLocation,
)
from nodeagent.mesh._notes import Notes, name
from nodeagent.mesh._workloads import Workloads
from nodeagent.policy import Subject
from nodeagent.settings import Settings
from ztunnel.protocol import DataPlane, Endpoint, Service, ServicePort

__all__ = ["ServiceReader", "Services"]


class Services(msgspec.Struct, frozen=True):
    """`resources` by uid."""

    resources: dict[str, Service]
    warnings: tuple[ConfigWarning, ...]


class ServiceReader:
    """Reads one set of ServiceEntries after another."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._selected: dict[int, _Selected] = {}
        """By the entry's `id`, which is its own while it is held here."""

    def read(self, entries: Sequence[ServiceEntry], workloads: Workloads) -> Services:
        """Return the services of `entries`, which come oldest first and each uid once."""
        notes = Notes()
        self._selected = {
            id(entry): _select(entry, workloads, self._selected.get(id(entry)))
            for entry in entries
            if entry.spec.workload_selector is not None
        }
        services = self._services(entries, workloads, notes)
        return Services(dict(sorted(services.items())), notes.found())

    def _services(
        self, entries: Sequence[ServiceEntry], workloads: Workloads, notes: Notes
    ) -> dict[str, Service]:
        services: dict[str, Service] = {}
        hosts: dict[str, ServiceEntry] = {}
        held: dict[tuple[str, int], ServiceEntry] = {}
        for entry in entries:
            ports = _ports(entry)
            if entry.spec.resolution is not Resolution.STATIC or not ports:
                continue
            endpoints = _endpoints(entry, ports, workloads, self._selected.get(id(entry)), notes)
            addresses = _addresses(entry, ports, held, workloads, self._settings, notes)
            for host in entry.spec.hosts:
                uid = f"{entry.metadata.namespace}/{host}"
                holder = hosts.setdefault(uid, entry)
                if holder is not entry:
                    reason = (
                        f"the host {host} belongs to {name(holder)}, which is older; remove one"
                    )
                    notes.add(entry, "spec.hosts", reason)
                    continue
                for address in addresses:
                    held.update({(address, port.number): entry for port in ports})
                services[uid] = Service(
                    uid=uid,
                    hostname=host,
                    namespace=entry.metadata.namespace,
                    addresses=addresses,
                    ports=ports,
                    endpoints=endpoints,
                )
                addresses = ()
        return services


class _Selected(NamedTuple):
    """What a ServiceEntry selects: of whom it was looked up, and the uids found, in order."""

    entry: ServiceEntry
    inside: Mapping[str, Subject]
    uids: tuple[str, ...]


def _select(entry: ServiceEntry, workloads: Workloads, known: _Selected | None) -> _Selected:
    inside = workloads.subjects.namespaces.get(entry.metadata.namespace, {})
    # A namespace in which nothing has changed is the same object.
    if known is not None and known.inside is inside:
        return known
    selector = entry.spec.workload_selector
    wanted = {} if selector is None else selector.labels
    # An empty selector selects nothing: the loader refuses it, and selecting all is what must never
    # happen by accident.
    chosen = sorted(
        uid
        for uid, subject in inside.items()
        if wanted and wanted.items() <= subject.labels.items()
    )
    return _Selected(entry, inside, tuple(chosen))


def _ports(entry: ServiceEntry) -> tuple[ServicePort, ...]:
    return tuple(
        ServicePort(port.number, port.target_port or port.number, port.name)
        for port in entry.spec.ports
        if port.protocol is not PortProtocol.UDP
    )


def _addresses(
    entry: ServiceEntry,
    ports: tuple[ServicePort, ...],
    held: Mapping[tuple[str, int], ServiceEntry],
    workloads: Workloads,
    settings: Settings,
    notes: Notes,
) -> tuple[str, ...]:
    """Return the virtual addresses that `entry` may have."""
    kept: list[str] = []
    for address in entry.spec.addresses:
        reason = ""
        reading = workloads.readings.get(workloads.owners.get(address, ""))
        owner = None if reading is None else reading.entry
        holder = next((held[address, p.number] for p in ports if (address, p.number) in held), None)
        if address in settings.node_addresses:
            reason = f"the address {address} is this node's own, and no service's"
        elif owner is not None and owner.metadata.namespace != entry.metadata.namespace:
            reason = f"the address {address} belongs to {name(owner)} of another namespace"
        elif holder is not None:
            reason = f"the address {address} with one of the ports belongs to {name(holder)}"
        if reason:
            notes.add(entry, "spec.addresses", f"{reason}; it is not used here, choose another")
        else:
            kept.append(address)
    return tuple(kept)


def _endpoints(
    entry: ServiceEntry,
    ports: tuple[ServicePort, ...],
    workloads: Workloads,
    selected: _Selected | None,
    notes: Notes,
) -> tuple[Endpoint, ...]:
    if selected is None:
        return tuple(
            _written(entry, each, ports, workloads, notes) for each in entry.spec.endpoints
        )
    found: list[Endpoint] = []
    for uid in selected.uids:
        addresses = workloads.resources[uid].addresses
        if addresses:
            spec = workloads.readings[uid].entry.spec
            found.append(Endpoint(uid, addresses[0], spec.weight, _own_ports(ports, spec.ports)))
    if not found:
        reason = "selects no workload of its namespace: connections to the service are refused"
        notes.add(entry, "spec.workloadSelector", reason)
    return tuple(found)


def _own_ports(ports: tuple[ServicePort, ...], named: Mapping[str, int]) -> dict[int, int]:
    """Return the ports that differ from the service's targets, by service port."""
    return {
        port.number: named[port.name]
        for port in ports
        if named.get(port.name, port.target) != port.target
    }


def _written(
    entry: ServiceEntry,
    endpoint: ServiceEntryEndpoint,
    ports: tuple[ServicePort, ...],
    workloads: Workloads,
    notes: Notes,
) -> Endpoint:
    """Return an endpoint that is written inside the ServiceEntry."""
    owner = workloads.owners.get(endpoint.address, "")
    workload = workloads.resources.get(owner)
    where = f"the endpoint {endpoint.address}"
    account = endpoint.service_account
    if workload is None or workload.data_plane is DataPlane.TCP:
        if entry.spec.location is ServiceLocation.MESH_INTERNAL:
            reason = f"{where} is no workload of the mesh: it is reached in plaintext"
            notes.add(entry, "spec.endpoints", reason)
    elif account is not None and account != workload.service_account:
        reason = f"{where}: serviceAccount has no effect, that of WorkloadEntry {owner} is expected"
        notes.add(entry, "spec.endpoints", reason)
    if endpoint.locality and (workload is None or workload.locality != endpoint.locality):
        reason = f"{where}: locality has no effect, only that of a WorkloadEntry is read"
        notes.add(entry, "spec.endpoints", reason)
    own = _own_ports(ports, endpoint.ports)
    return Endpoint(owner, endpoint.address, endpoint.weight, own)
