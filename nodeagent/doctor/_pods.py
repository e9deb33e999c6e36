"""Judges pods, their capture, and the way to other nodes: pure.

This module owns the findings NA3…, NA5002 to NA5004 and NA5006. It may not look at anything but
the facts.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from ipaddress import ip_address
from typing import Final

from nodeagent.admin.model import PodReport, PodState
from nodeagent.capture.layout import MARK_TUNNEL
from nodeagent.doctor._make import finding
from nodeagent.doctor.facts import Drop, Facts, Outcome, Peer, PodLook, Probe, ProbeOutcome
from nodeagent.doctor.model import NODE, Finding

__all__ = ["judge"]

NEARLY_ALL: Final = 0.9
"""Of the connections that conntrack has room for: what is left goes in seconds."""

V4: Final = 4

MOST_NAMED: Final = 5
"""Addresses or rules that one finding names."""


def judge(facts: Facts) -> Iterator[Finding]:
    status = facts.agent.status
    reports = {pod.workload: pod for pod in status.pods} if status is not None else {}
    looks = {look.workload: look for look in facts.pods}
    for workload in sorted(reports.keys() | looks.keys()):
        yield from _state(reports.get(workload), looks.get(workload))
        look = looks.get(workload)
        if look is not None and not look.problem:
            yield from _inside(look)
    yield from _drops(facts.node_drops, (NODE,))
    yield from _forwarding(facts)
    yield from _peers(facts.peers, {look.workload: look.netns for look in facts.pods})
    if facts.counts is not None and facts.counts.blocked:
        yield finding(
            "NA5006",
            f"{facts.counts.blocked} connections to port 15008 have timed out since ztunnel began",
            "the access log names their destinations: is there a NetworkPolicy or firewall?",
            "journalctl -u ztunnel -o cat | grep 15008 | grep timeout | tail",
        )


def enter(netns: str) -> str:
    """Return what to put before a command to run it in a pod's namespace."""
    return (
        f"nsenter --net={shlex.quote(netns)}"
        if netns.startswith("/")
        else f"ip netns exec {shlex.quote(netns)}"
    )


# --- one pod -------------------------------------------------------------------------------------


def _state(report: PodReport | None, look: PodLook | None) -> Iterator[Finding]:
    if report is None:
        if look is not None and look.gone:
            yield finding(
                "NA3003",
                f"it was captured, and {look.problem}",
                "nodeagent removes what is left of it once it runs",
                "systemctl restart nodeagent",
                affects=[look.workload],
            )
        return
    affects = [report.workload]
    detail = f": {report.error}" if report.error else ""
    match report.state:
        case PodState.WAITING:
            yield finding(
                "NA3003",
                report.error or f"network namespace {report.netns} does not exist",
                "start the workload, or correct the annotation nodeagent.io/netns",
                "ip netns list",
                affects=affects,
            )
        case PodState.FAILED:
            yield finding(
                "NA3001",
                f"{report.workload} is not captured{detail}",
                "it is tried again by itself; the log has every attempt",
                "journalctl -u nodeagent --since -15min --no-pager",
                affects=affects,
            )
        case PodState.DEGRADED:
            wrong = ", ".join(report.deviations[:MOST_NAMED]) or "an audit failed"
            yield finding(
                "NA3002",
                f"{wrong}{detail}; the pod is kept closed there",
                "look for what changes its namespace: a process in the pod with CAP_NET_ADMIN",
                f"{enter(report.netns)} ip rule show",
                affects=affects,
            )
        case PodState.ENROLLED | PodState.ENROLLING | PodState.REMOVING:
            pass


def _inside(look: PodLook) -> Iterator[Finding]:
    affects = [look.workload]
    for holder in look.holders:
        if not holder.ours:
            yield finding(
                "NA3005",
                f"{holder.name} (process {holder.pid}) listens on port {holder.port} in the pod",
                "move it to another port: 15001, 15006 and 15008 are the tunnel's in every pod",
                f"{enter(look.netns)} ss -ltnp sport = :{holder.port}",
                f"kill {holder.pid}",
                affects=affects,
            )
    yield from _foreign(look)
    if look.rules_before:
        yield finding(
            "NA3009",
            "; ".join(look.rules_before[:MOST_NAMED]),
            "see that none of them turns TCP: what they turn past the tunnel is dropped",
            f"{enter(look.netns)} ip rule show",
            affects=affects,
        )
    yield from _drops(look.drops, affects)
    yield from _probes(look)
    if look.unguarded:
        yield finding(
            "NA3002",
            f"nothing drops what goes around the tunnel: {', '.join(look.unguarded[:MOST_NAMED])}",
            "nodeagent puts it back within seconds; while it is down its next start does",
            f"{enter(look.netns)} tc filter show dev {shlex.quote(_device(look.unguarded))} egress",
            "systemctl restart nodeagent",
            affects=affects,
        )
    silent = [address for address, said in look.hbone.items() if said is not Outcome.ANSWERED]
    if silent:
        said = ", ".join(f"{address} {look.hbone[address]}" for address in silent[:MOST_NAMED])
        yield finding(
            "NA3008",
            f"from this node: {said}; other nodes reach the pod there and nowhere else",
            "let TCP port 15008 of the pod in: NetworkPolicy, packet filter, cloud firewall",
            f"{enter(look.netns)} nft list ruleset",
            "nft list ruleset",
            affects=affects,
        )


def _device(unguarded: Iterable[str]) -> str:
    return next(iter(unguarded)).partition(" ")[0]


def _foreign(look: PodLook) -> Iterator[Finding]:
    programs = look.programs[:MOST_NAMED]
    found = [
        *look.foreign[:MOST_NAMED],
        *(f"BPF program {each.number}, {each.name!r}, chooses sockets" for each in programs),
    ]
    if not found:
        return
    commands = [f"bpftool --bpffs prog show id {each.number}" for each in programs]
    if look.foreign:
        commands += [f"{enter(look.netns)} ip rule show", f"{enter(look.netns)} nft list ruleset"]
    yield finding(
        "NA3006",
        "; ".join(found),
        "another mesh, or an agent with another bpf_dir (its program is called 'capture'): take "
        "the pod out of the one; bpftool shows who holds a program and where it is pinned",
        *commands,
        affects=[look.workload],
    )


def _probes(look: PodLook) -> Iterator[Finding]:
    silent = [each for each in look.probes if each.outcome is ProbeOutcome.SILENT]
    around = (ProbeOutcome.NOT_TAKEN, ProbeOutcome.STRANGE)
    past = [each for each in look.probes if each.outcome in around]
    if silent:
        yield finding(
            "NA3007",
            f"a probe from inside {look.workload} was taken: {_said(silent)}",
            "ztunnel hangs, or serves this pod no more; a reload replaces it",
            "journalctl -u ztunnel --since -15min --no-pager",
            "systemctl reload ztunnel",
            affects=[look.workload],
        )
    if past:
        yield finding(
            "NA3004",
            f"a probe from inside {look.workload} was not taken by the tunnel: {_said(past)}",
            "nodeagent puts right what it finds missing within seconds; this it cannot, or not yet",
            f"{enter(look.netns)} ip rule show",
            f"{enter(look.netns)} ip route show table 100",
            f"{enter(look.netns)} nft list ruleset",
            "journalctl -u nodeagent --since -15min --no-pager",
            affects=[look.workload],
        )


def _said(probes: Iterable[Probe]) -> str:
    return ", ".join(f"IPv{each.version}: {each.detail}" for each in probes)


def _drops(drops: Iterable[Drop], affects: Iterable[str]) -> Iterator[Finding]:
    found = list(drops)
    if found:
        yield finding(
            "NA5003",
            "; ".join(each.rule for each in found[:MOST_NAMED]),
            "take the rule out, or except the mesh's pods from it",
            *(each.command for each in found[:MOST_NAMED]),
            affects=affects,
        )


# --- other nodes ---------------------------------------------------------------------------------


def _forwarding(facts: Facts) -> Iterator[Finding]:
    """What of this node's own keeps its pods from reaching other nodes, where they do not."""
    network = facts.network
    lost = [each for each in facts.peers if each.outcome is Outcome.SILENT]
    for version in sorted({ip_address(each.address).version for each in lost}):
        if not network.forwards.get(version, True):
            name = "net.ipv4.ip_forward" if version == V4 else "net.ipv6.conf.all.forwarding"
            yield finding(
                "NA5007",
                f"{name} is 0, and pods of other nodes do not answer",
                "switch it on, and see who switches it off: a file of sysctl.d, or another program",
                f"sysctl -w {name}=1",
                f"grep -rs {name} /etc/sysctl.conf /etc/sysctl.d /usr/lib/sysctl.d",
            )
    if network.tracked > NEARLY_ALL * network.tracked_most > 0:
        yield finding(
            "NA5008",
            f"{network.tracked} of {network.tracked_most} connections are tracked: what begins "
            "beyond that is dropped, whoever begins it",
            "raise the limit, or see who has so many",
            f"sysctl -w net.netfilter.nf_conntrack_max={2 * network.tracked_most}",
        )


def _peers(peers: Iterable[Peer], spaces: Mapping[str, str]) -> Iterator[Finding]:
    nodes: dict[str, list[Peer]] = {}
    for peer in peers:
        nodes.setdefault(peer.node or peer.address, []).append(peer)
    for node, seen in sorted(nodes.items()):
        refused = [peer for peer in seen if peer.outcome is Outcome.REFUSED]
        blocked = [peer for peer in seen if peer.outcome is Outcome.SILENT]
        no_way = [peer for peer in seen if peer.outcome is Outcome.UNREACHABLE]
        if refused:
            yield finding(
                "NA5004",
                f"{node}: {_named(refused)}",
                "start the agent there; without it those pods cannot be called through the mesh",
                "nodeagent doctor  # on that node",
                affects=[node],
            )
        if no_way:
            least = no_way[0]
            inside = enter(spaces.get(least.seen_from, ""))
            yield finding(
                "NA5002",
                f"{node}: {_named(no_way)}: the pod has no route to it",
                "give the pod its routes back; they are the network's own, not the agent's",
                f"{inside} ip route get {least.address} mark {MARK_TUNNEL:#x}",
                affects=[node, *sorted({peer.seen_from for peer in no_way})],
            )
        if blocked:
            least = blocked[0]
            yield finding(
                "NA5002",
                f"{node}: {_named(blocked)}",
                "let TCP port 15008 through between pods of all nodes: NetworkPolicy, firewall, "
                "security group",
                f"nc -vz -w 3 {least.address} 15008  # from another pod that is not captured",
                "nodeagent doctor  # on that node",
                affects=[node, *sorted({peer.seen_from for peer in blocked})],
            )


def _named(peers: list[Peer]) -> str:
    named = [
        f"{peer.workload} ({peer.address}) {peer.outcome} from {peer.seen_from}"
        for peer in peers[:MOST_NAMED]
    ]
    rest = len(peers) - MOST_NAMED
    return ", ".join(named) + (f", and {rest} more" if rest > 0 else "")
