"""Looks at the node: everything that `nodeagent doctor` judges, read at one moment.

This package owns the looking. It promises to change nothing on the node, to leave no trace in
anybody's counters, that what cannot be read is named and stops nothing else, and to work while both
daemons are down. It may not judge: that is `nodeagent.doctor.judge`'s.
"""

from __future__ import annotations

import http.client
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from nodeagent.admin.model import PodState
from nodeagent.capture import inspect
from nodeagent.capture.layout import HBONE_PORT
from nodeagent.doctor.facts import (
    TUNNEL_PORTS,
    Agent,
    Clock,
    Facts,
    Feature,
    Network,
    Outcome,
    Peer,
    PodLook,
    TunnelCounts,
    Unexamined,
)
from nodeagent.doctor.gather import filters, host, pods, processes, tunnel
from nodeagent.doctor.gather.probes import half_open
from nodeagent.pods.threads import run_inside
from nodeagent.rundir import CONTROL_SOCKET, LOCK_FILE
from nodeagent.settings import Settings
from ztunnel.protocol import PROTOCOL_VERSION, DataPlane
from ztunnel.release import release

__all__ = ["Asked", "gather"]

T = TypeVar("T")


class Asked(msgspec.Struct, frozen=True):
    """What the agent was asked: its status, and the state that it holds for ztunnel."""

    agent: Agent
    resources: Mapping[str, list[dict[str, Any]]] = {}


class _Home(Protocol):
    """Calls a function inside the node's network namespace, as the daemons see it."""

    def __call__(self, function: Callable[[], T]) -> T: ...


class _Looker:
    """One look, with what could not be seen."""

    def __init__(self) -> None:
        self.unexamined: list[Unexamined] = []

    def try_to(self, what: str, function: Callable[[], T]) -> T | None:
        """Return what `function` does; None, with the error noted, where it fails."""
        try:
            return function()
        except (OSError, ValueError, http.client.HTTPException) as error:
            why = getattr(error, "strerror", None) or str(error)
            self.unexamined.append(Unexamined(what, why))
            return None

    def filters_unseen(self, whose: str, problems: Iterable[str]) -> None:
        """Note which packet filters could not be read: what all lack once, and not by pod."""
        noted = {each.why for each in self.unexamined}
        self.unexamined += [
            Unexamined(f"packet filter of {whose}", why) for why in problems if why not in noted
        ]


def gather(
    settings: Settings, settings_file: Path | None, settings_problem: str, asked: Asked
) -> Facts:
    """Look at everything. Without root most of it fails, each part with its reason."""
    looker = _Looker()
    status = asked.agent.status
    running = processes.processes()
    agent_pid = status.pid if status is not None else _lock_holder(settings.run_dir / LOCK_FILE)
    tunnel_pid = processes.tunnel_of(settings.run_dir / CONTROL_SOCKET, running)
    ours = frozenset({agent_pid, tunnel_pid, *_draining(asked.agent)})
    known = processes.socket_holders()

    def at_home(function: Callable[[], T]) -> T:
        pid = agent_pid or tunnel_pid or os.getpid()
        fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return run_inside(fd, function)
        finally:
            os.close(fd)

    ports = (*TUNNEL_PORTS, int(settings.admin_address.rpartition(":")[2]))
    sockets = looker.try_to("ports", lambda: at_home(lambda: processes.listening(ports))) or {}
    counts: TunnelCounts | None = None
    tunnel_silent = False
    if tunnel_pid:
        try:
            counts = looker.try_to("ztunnel's metrics", lambda: at_home(tunnel.counts))
        except tunnel.SilentError:
            tunnel_silent = True
    features = looker.try_to(
        "kernel features", lambda: at_home(lambda: inspect.features(settings.bpf_dir))
    )
    rules = looker.try_to("the node's packet filter", lambda: at_home(lambda: filters.rules("")))
    if rules is not None:
        looker.filters_unseen("the node", rules.problems)
    looks, peers = _pods(settings, asked, ours, known, looker, at_home)
    for look in looks:
        looker.filters_unseen(look.workload, look.unseen)
    control_socket = settings.run_dir / CONTROL_SOCKET
    return Facts(
        now=datetime.now(UTC),
        node=settings.node,
        release=release(),
        protocol_version=PROTOCOL_VERSION,
        settings_file=str(settings_file) if settings_file is not None else "",
        settings_problem=settings_problem,
        trust_domain=settings.trust_domain,
        features=tuple(
            Feature(each.name, each.present, each.detail, each.needed_for)
            for each in features or ()
        ),
        policy_routing=_policy_routing(at_home),
        agent=asked.agent,
        nodeagent=processes.described("nodeagent", agent_pid),
        ztunnel=processes.described("ztunnel", tunnel_pid),
        counts=counts,
        tunnel_silent=tunnel_silent,
        control_socket="" if control_socket.exists() else str(control_socket),
        node_ports=processes.holders(sockets, known, ours),
        network=looker.try_to("forwarding", lambda: at_home(host.network)) or Network(),
        node_drops=rules.drops if rules is not None else (),
        pods=tuple(looks),
        peers=tuple(peers),
        clock=looker.try_to("the clock", host.clock) or Clock(),
        authority=looker.try_to("the CA", lambda: host.authority(settings)),
        loose=looker.try_to("permissions", lambda: host.loose(settings, settings_file)) or (),
        disks=looker.try_to("disks", lambda: host.disks(settings)) or (),
        strangers=processes.strangers(running),
        unexamined=tuple(looker.unexamined),
    )


def _pods(
    settings: Settings,
    asked: Asked,
    ours: frozenset[int],
    known: dict[int, tuple[int, str]],
    looker: _Looker,
    at_home: _Home,
) -> tuple[list[PodLook], list[Peer]]:
    pinned = looker.try_to("pinned objects", lambda: inspect.pinned_pods(settings.bpf_dir)) or []
    own_programs = {program for _, program in pinned}
    attached: dict[int, set[int]] = {}
    for netns, program in looker.try_to("attached programs", lambda: [*inspect.programs()]) or ():
        if program not in own_programs:
            attached.setdefault(netns, set()).add(program)
    status = asked.agent.status
    if status is not None:
        captured = (PodState.ENROLLED, PodState.DEGRADED)
        targets = [
            pods.Known(each.workload, each.netns, each.addresses, each.state in captured)
            for each in status.pods
            if each.netns
        ]
    else:
        targets = [
            pods.Known(record.uid.partition("@")[0], record.netns_path, record.addresses, True)
            for record, _ in pinned
        ]
    around = pods.Surroundings(
        known, ours, {netns: frozenset(numbers) for netns, numbers in attached.items()}
    )
    # Of captured pods that are there: nobody else is expected to listen.
    addresses = {
        address: each.workload for each in targets for address in each.addresses if each.captured
    }
    with ThreadPoolExecutor(1, thread_name_prefix="view") as beside:
        view = beside.submit(
            looker.try_to,
            "port 15008 of this node's pods",
            lambda: at_home(lambda: half_open(addresses, HBONE_PORT)),
        )
        looks, peers, late = pods.look(targets, _remote(asked.resources, settings.node), around)
        seen = view.result() or {}
    if late:
        why = f"looking at the others took {pods.ALL_SECONDS:.0f} s"
        looker.unexamined.append(Unexamined(f"{len(late)} pods, {late[0]} the first", why))
    return [_with_node_view(each, addresses, seen) for each in looks], peers


def _with_node_view(
    look: PodLook, addresses: Mapping[str, str], seen: Mapping[str, Outcome]
) -> PodLook:
    own = {
        address: outcome for address, outcome in seen.items() if addresses[address] == look.workload
    }
    return msgspec.structs.replace(look, hbone=own)


def _remote(resources: Mapping[str, list[dict[str, Any]]], node: str) -> list[pods.PeerPod]:
    """Return the mesh's pods of other nodes that speak HBONE, by the state that ztunnel holds."""
    return [
        pods.PeerPod(str(each.get("uid", "")), str(each.get("node", "")), str(address))
        for each in resources.get("workload", ())
        if each.get("data_plane") == DataPlane.HBONE.value and each.get("node") not in ("", node)
        for address in each.get("addresses", ())
    ]


def _policy_routing(at_home: _Home) -> str:
    try:
        at_home(inspect.foreign_rules)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _draining(agent: Agent) -> list[int]:
    status = agent.status
    if status is None:
        return []
    return [status.ztunnel.pid, *(each.pid for each in status.ztunnel.draining)]


def _lock_holder(path: Path) -> int:
    """Return the process that holds the run directory's lock (proc_locks(5)), 0 for none."""
    try:
        inode = path.stat().st_ino
        table = Path("/proc/locks").read_text(encoding="ascii")
    except OSError:
        return 0
    for line in table.splitlines():
        fields = line.split()
        if len(fields) > 5 and fields[1] == "FLOCK" and fields[5].endswith(f":{inode}"):  # noqa: PLR2004 - pid and place
            return int(fields[4])
    return 0
