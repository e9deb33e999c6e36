"""What is seen of each pod: from inside its network namespace, and from the node.

This module owns visiting the pods, several at once. It promises that one pod's trouble, or its
disappearance, is that pod's alone, that the whole takes a bounded time, and that nothing is changed
in any namespace.
"""

from __future__ import annotations

import ipaddress
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import msgspec

from nodeagent.capture import inspect
from nodeagent.capture.layout import HBONE_PORT, MARK_TUNNEL, PORTS
from nodeagent.doctor.facts import Outcome, Peer, PodLook, Probe, SocketProgram
from nodeagent.doctor.gather import filters, processes
from nodeagent.doctor.gather.probes import half_open, through_tunnel
from nodeagent.pods import NetnsError, NetnsReason, open_netns
from nodeagent.pods.threads import run_inside

__all__ = ["Known", "PeerPod", "Surroundings", "look"]

AT_ONCE: Final = 8
"""Pods that are visited at the same time: what takes long there is waiting."""

ALL_SECONDS: Final = 60.0
"""For all pods: a person waits. Those whose turn has not come are named as not examined."""

MAX_PEERS: Final = 16
"""Other nodes that one pod tries: each pod takes others, so that together they reach many."""


class Known(msgspec.Struct, frozen=True):
    """A pod to look at. `captured`: it should be, so that probes have an answer to expect."""

    workload: str
    netns: str
    addresses: tuple[str, ...]
    captured: bool


class PeerPod(msgspec.Struct, frozen=True):
    """A pod of another node that speaks HBONE."""

    workload: str
    node: str
    address: str


class Surroundings(msgspec.Struct, frozen=True):
    """What is the same for all pods: holders of sockets, our processes, attached programs."""

    holders: dict[int, tuple[int, str]]
    ours: frozenset[int]
    programs: dict[int, frozenset[int]]
    """By the network namespace's inode, those of the capture left out."""


class _Inside(msgspec.Struct, frozen=True):
    probes: tuple[Probe, ...]
    sockets: dict[int, list[int]]
    filters: filters.Rules
    unguarded: list[str]
    rules: tuple[list[str], list[str]]
    reached: dict[str, Outcome]


def look(
    pods: Sequence[Known], peers: Sequence[PeerPod], around: Surroundings
) -> tuple[list[PodLook], list[Peer], list[str]]:
    """Return what was seen, and the workloads whose turn did not come."""
    late: list[str] = []
    looks: list[PodLook] = []
    reached: list[Peer] = []
    end = time.monotonic() + ALL_SECONDS
    nodes = _by_node(peers)

    def one(number: int) -> tuple[PodLook, list[Peer]] | None:
        if time.monotonic() >= end:
            return None
        return _visit(pods[number], _chosen(nodes, number, pods[number]), around)

    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="look") as pool:
        for pod, found in zip(pods, pool.map(one, range(len(pods))), strict=True):
            if found is None:
                late.append(pod.workload)
                continue
            looks.append(found[0])
            reached += found[1]
    return looks, reached, late


def _by_node(peers: Iterable[PeerPod]) -> dict[str, list[PeerPod]]:
    nodes: dict[str, list[PeerPod]] = {}
    for peer in peers:
        nodes.setdefault(peer.node or peer.address, []).append(peer)
    return nodes


def _chosen(nodes: Mapping[str, list[PeerPod]], number: int, pod: Known) -> list[PeerPod]:
    """Return one pod of each of some nodes, other ones for each `number`."""
    if not pod.captured:
        return []
    versions = {ipaddress.ip_address(each).version for each in pod.addresses}
    names = sorted(nodes)
    start = number * MAX_PEERS % len(names) if names else 0
    chosen: list[PeerPod] = []
    for name in (names[start:] + names[:start])[:MAX_PEERS]:
        usable = [
            each for each in nodes[name] if ipaddress.ip_address(each.address).version in versions
        ]
        if usable:
            chosen.append(usable[number % len(usable)])
    return chosen


def _visit(
    pod: Known, peers: Sequence[PeerPod], around: Surroundings
) -> tuple[PodLook, list[Peer]]:
    try:
        netns = open_netns(pod.netns)
    except NetnsError as error:
        gone = error.reason in (NetnsReason.MISSING, NetnsReason.NOT_A_NAMESPACE)
        return PodLook(workload=pod.workload, netns=pod.netns, problem=str(error), gone=gone), []
    try:
        seen = run_inside(netns.fd, _inside, pod, str(netns.path), [each.address for each in peers])
        programs = tuple(
            SocketProgram(number, inspect.program_name(number))
            for number in sorted(around.programs.get(netns.inode, frozenset()))
        )
    except OSError as error:
        return PodLook(workload=pod.workload, netns=pod.netns, problem=str(error)), []
    finally:
        netns.close()
    holders = processes.holders(seen.sockets, around.holders, around.ours)
    return (
        PodLook(
            workload=pod.workload,
            netns=pod.netns,
            probes=seen.probes,
            holders=holders,
            drops=seen.filters.drops,
            foreign=(*seen.rules[0], *seen.filters.redirects),
            unguarded=tuple(seen.unguarded),
            unseen=seen.filters.problems,
            rules_before=tuple(seen.rules[1]),
            programs=programs,
        ),
        [
            Peer(each.workload, each.node, each.address, pod.workload, seen.reached[each.address])
            for each in peers
            if each.address in seen.reached
        ],
    )


def _inside(pod: Known, path: str, peers: Sequence[str]) -> _Inside:
    versions = sorted({ipaddress.ip_address(each).version for each in pod.addresses})
    return _Inside(
        probes=through_tunnel(versions) if pod.captured else (),
        sockets=processes.listening(PORTS),
        filters=filters.rules(f"nsenter --net={shlex.quote(path)} "),
        unguarded=inspect.unguarded() if pod.captured else [],
        rules=inspect.foreign_rules(),
        reached=half_open(peers, HBONE_PORT, MARK_TUNNEL) if peers else {},
    )
