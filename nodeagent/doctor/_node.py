"""Judges kernel, daemons, ports, configuration, files and disks: pure.

This module owns the findings NA1…, NA2…, NA5001, NA5005, NA6… and NA7…. It may not look at
anything but the facts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from nodeagent.admin.model import Problem, Status
from nodeagent.api import ConfigError
from nodeagent.doctor._make import finding
from nodeagent.doctor.facts import TUNNEL_PORTS, Daemon, Facts
from nodeagent.doctor.model import NODE, Finding

__all__ = ["judge"]

JOURNAL: Final = "journalctl -u {} --since -15min --no-pager"

LEAST_DESCRIPTORS: Final = {"nodeagent": 4096, "ztunnel": 16384}
"""A pod takes four of nodeagent and eight of ztunnel, and a connection up to four of ztunnel: below
this a node with a few hundred pods runs out. The units set many more."""

NEARLY_ALL: Final = 0.9
"""Of the descriptors: what is left goes in seconds when something retries."""

LEAST_FREE_BYTES: Final = 64 * 1024 * 1024
"""The recorded flows' default size: below it the next report may not be written."""
LEAST_FREE_INODES: Final = 1000
"""A handful would do; others write on the same file system."""

MOST_NAMED: Final = 5
"""Problems of one kind that are shown; the rest is counted."""


def judge(facts: Facts) -> Iterator[Finding]:
    yield from _kernel(facts)
    yield from _daemons(facts)
    yield from _ports(facts)
    yield from _configuration(facts)
    yield from _storage(facts)


# --- kernel --------------------------------------------------------------------------------------


def _kernel(facts: Facts) -> Iterator[Finding]:
    for feature in facts.features:
        if feature.present:
            continue
        text = f"{feature.name}: {feature.detail}"
        if feature.needed_for:
            yield finding(
                "NA1002",
                f"{text}; it is for {feature.needed_for}",
                "boot a newer kernel; until then old connections do not survive an enrolment",
                "uname -r",
            )
        elif feature.name == "bpffs":
            yield finding("NA1001", text, "mount it", "mount -t bpf bpf /sys/fs/bpf")
        else:
            yield finding(
                "NA1001",
                text,
                "boot Linux 5.17 or newer with BTF, as Debian 12 has it",
                "uname -r",
                "apt-get install linux-image-amd64",
            )
    if facts.policy_routing:
        yield finding(
            "NA1003",
            f"routing rules cannot be read: {facts.policy_routing}",
            "boot a kernel with CONFIG_IP_MULTIPLE_TABLES (and CONFIG_IPV6_MULTIPLE_TABLES)",
            "ip rule show",
        )


# --- daemons -------------------------------------------------------------------------------------


def _daemons(facts: Facts) -> Iterator[Finding]:
    status = facts.agent.status
    if status is None:
        daemon = facts.nodeagent
        runs = f"process {daemon.pid} holds its lock, and cannot be asked: " if daemon else ""
        yield finding(
            "NA2001",
            f"{runs}{facts.agent.cause}{_stopped(daemon)}; ztunnel goes on with the last state, "
            "and what is captured stays captured",
            "restart it: no connection notices" if daemon else facts.agent.remedy,
            *_go_on(daemon),
            "systemctl restart nodeagent",
            JOURNAL.format("nodeagent"),
            affects=(NODE, "nodeagent"),
        )
    elif facts.control_socket:
        yield finding(
            "NA2007",
            f"{facts.control_socket} is gone: the ztunnel that runs goes on, and one that is "
            "started does not find nodeagent",
            "restart nodeagent, which makes it anew; no connection notices",
            "systemctl restart nodeagent",
        )
    yield from _ztunnel(facts, status)
    yield from _releases(facts, status)
    for daemon in (facts.nodeagent, facts.ztunnel):
        if daemon is not None:
            yield from _descriptors(daemon)


def _stopped(daemon: Daemon | None) -> str:
    return "; it is stopped, by a signal or a debugger" if daemon and daemon.stopped else ""


def _go_on(daemon: Daemon | None) -> list[str]:
    return [f"kill -CONT {daemon.pid}"] if daemon and daemon.stopped else []


def _ztunnel(facts: Facts, status: Status | None) -> Iterator[Finding]:
    if facts.ztunnel is None and (status is None or not status.ztunnel.connected):
        yield finding(
            "NA2002",
            "no ztunnel runs for this agent: connections of captured pods wait, and then fail",
            "start it, and look why it ended",
            "systemctl restart ztunnel",
            JOURNAL.format("ztunnel"),
            affects=(NODE, "ztunnel"),
        )
        return
    if status is None:
        if facts.tunnel_silent:
            yield from _not_ready(["it does not answer on the port of its metrics"], facts.ztunnel)
        return
    seam = status.ztunnel
    if not seam.connected:
        yield finding(
            "NA2002",
            "ztunnel runs and is not connected to nodeagent: it knows no change since then",
            "look why it does not connect; a reload starts a successor beside it",
            JOURNAL.format("ztunnel"),
            "systemctl restart ztunnel",
        )
        return
    if seam.rejected or seam.oversized:
        refused = f"it refused it: {seam.rejected}" if seam.rejected else ""
        large = f"too large: {', '.join(seam.oversized[:MOST_NAMED])}" if seam.oversized else ""
        yield finding(
            "NA2005",
            "; ".join(filter(None, (refused, large))),
            "split what is too large; what is refused the log explains, and the state before is "
            "in force until then",
            JOURNAL.format("ztunnel"),
        )
    yield from _not_ready(_lacks(seam.own, seam.error), facts.ztunnel)


def _lacks(own: dict[str, Any] | None, error: str) -> list[str]:
    checks = own.get("ready") if own is not None else None
    lacks = [
        f"{name}: {problem}"
        for name, problem in (checks.items() if isinstance(checks, dict) else ())
        if problem
    ]
    return [*lacks, error] if error else lacks


def _not_ready(lacks: list[str], daemon: Daemon | None) -> Iterator[Finding]:
    if not lacks:
        return
    text = "; ".join(lacks[:MOST_NAMED])
    if daemon is not None and daemon.stopped:
        remedy, commands = "let it go on; see who stopped it", _go_on(daemon)
    else:
        remedy = "look what its log says; a reload replaces it without losing a connection"
        commands = [JOURNAL.format("ztunnel"), "systemctl reload ztunnel"]
    yield finding("NA2003", text + _stopped(daemon), remedy, *commands)


def _releases(facts: Facts, status: Status | None) -> Iterator[Finding]:
    found = {"this command": facts.release}
    if status is not None:
        found["nodeagent"] = status.version
    tunnel = facts.counts.release if facts.counts is not None else ""
    if tunnel:
        found["ztunnel"] = tunnel
    own = status.ztunnel.own if status is not None else None
    spoken = own.get("protocol_version", facts.protocol_version) if own is not None else None
    other_protocol = spoken is not None and spoken != facts.protocol_version
    if len(set(found.values())) > 1 or other_protocol:
        text = ", ".join(f"{name} {release}" for name, release in found.items())
        if other_protocol:
            text += f"; ztunnel speaks protocol {spoken}, this release {facts.protocol_version}"
        yield finding(
            "NA2004",
            text,
            "bring both to the installed release; no connection notices, in this order",
            "systemctl reload ztunnel",
            "systemctl restart nodeagent",
        )


def _descriptors(daemon: Daemon) -> Iterator[Finding]:
    most = daemon.descriptors_most
    if not most:
        return
    command = f"systemctl edit {daemon.name}  # [Service] LimitNOFILE=1048576"
    if daemon.descriptors > NEARLY_ALL * most:
        text = f"{daemon.name} holds {daemon.descriptors} of {most} descriptors"
    elif most < LEAST_DESCRIPTORS[daemon.name]:
        text = (
            f"{daemon.name} may have {most} descriptors, "
            f"less than the {LEAST_DESCRIPTORS[daemon.name]} of a busy node"
        )
    else:
        return
    yield finding("NA2006", text, "raise LimitNOFILE= of its unit, and restart it", command)


# --- ports and other agents ----------------------------------------------------------------------


def _ports(facts: Facts) -> Iterator[Finding]:
    for holder in facts.node_ports:
        if holder.ours:
            continue
        yield finding(
            "NA5001",
            f"{holder.name} (process {holder.pid}) listens on port {holder.port} of this node",
            "move that program, or the daemon's port (admin_address of the settings; "
            "--stats-address and --ready-address of ztunnel)",
            f"ss -ltnp sport = :{holder.port}",
            affects=["ztunnel" if holder.port in TUNNEL_PORTS else "nodeagent"],
        )
    for stranger in facts.strangers:
        yield finding(
            "NA5005",
            f"{stranger.what} runs here (process {stranger.pid}): two meshes that capture the "
            "same pods break each other",
            "see that no pod is in both; take one of them off this node if any is",
            f"ps -o pid,user,args -p {stranger.pid}",
        )


# --- configuration -------------------------------------------------------------------------------


def _configuration(facts: Facts) -> Iterator[Finding]:
    if facts.settings_problem:
        yield finding(
            "NA6001",
            facts.settings_problem,
            "correct the file; the next start of nodeagent would fail, and a reload is refused",
            *([f"${{EDITOR:-vi}} {facts.settings_file}"] if facts.settings_file else []),
        )
    if facts.agent.status is None:
        return
    config = facts.agent.status.config
    if not config.loaded:
        yield finding(
            "NA6004",
            f"nothing could be loaded from {config.source}: nothing is enrolled or removed",
            "make the directory readable for the agent",
            f"ls -ld {config.source}",
        )
    for code, problems, remedy in (
        ("NA6002", config.problems, "correct it; its file's last good version stays in force"),
        ("NA6003", config.unresolved, "correct it; what depends on it is closed until then"),
    ):
        for problem in problems[:MOST_NAMED]:
            yield finding(
                code,
                _place(problem),
                remedy,
                f"nodeagent policy check {problem.file}",
                affects=[problem.file],
            )
        if len(problems) > MOST_NAMED:
            more = f"and {len(problems) - MOST_NAMED} more like it"
            yield finding(code, more, remedy, "nodeagent status -o json")
    if config.unenforced:
        named = ", ".join(each.policy for each in config.unenforced[:MOST_NAMED])
        yield finding(
            "NA6005",
            f"{len(config.unenforced)} with parts of layer 7: {named}",
            "nodeagent status says of each what is done instead; write it for layer 4",
            "nodeagent status",
        )


def _place(problem: Problem) -> str:
    return str(
        ConfigError(problem.file, problem.line, problem.column, problem.field, problem.reason)
    )


# --- files and disks -----------------------------------------------------------------------------


def _storage(facts: Facts) -> Iterator[Finding]:
    for disk in facts.disks:
        few_inodes = disk.inodes and disk.free_inodes < LEAST_FREE_INODES
        if disk.free < LEAST_FREE_BYTES or few_inodes:
            room = f"{disk.free // 1024 // 1024} MiB of {disk.size // 1024 // 1024} MiB free"
            text = f"{disk.path}: {room}"
            if few_inodes:
                text += f", {disk.free_inodes} inodes left"
            yield finding(
                "NA7001",
                text,
                "make room; traffic goes on, but callers are not recorded, an audit file loses "
                "lines, and a new CA certificate cannot be written",
                f"df -h {disk.path}",
                f"du -xsh {disk.path}/* | sort -h | tail",
            )
    for each in facts.loose:
        yield finding(
            "NA7004",
            f"{each.path}: {each.problem}",
            "close it; if a key lay there, think who may have read it (docs/identity.md)",
            each.command,
        )
    status = facts.agent.status
    if status is None:
        return
    if status.recording is not None and status.recording.problem:
        yield finding(
            "NA7002",
            f"{status.recording.problem}; {status.recording.lost} reports lost since the start",
            "make room, or move the file away: a new one is begun within half a minute",
            JOURNAL.format("nodeagent"),
        )
    sinks = (status.ztunnel.own or {}).get("audit")
    for sink, problem in sinks.items() if isinstance(sinks, dict) else ():
        if problem:
            yield finding(
                "NA7003",
                f"{sink}: {problem}",
                "mend what it names; lines wait, and those that find no room are counted",
                "curl -s 127.0.0.1:15020/metrics | grep ztunnel_audit",
            )
