"""What is pinned and attached, for whoever only looks: beside a running agent, or without one.

This module owns the read-only side of the capture. It promises to change nothing: no pin, no map,
no program, and nothing in a pod. It blocks, and runs in the agent's own network namespace.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from nodeagent.capture import _libbpf
from nodeagent.capture.actions import DIRECTIONS, FILTER_NAME, PREFERENCES
from nodeagent.capture.layout import TABLE, V4, V6
from nodeagent.capture.model import Finding
from nodeagent.capture.netlink_read import read_clsact, read_filters, read_rules
from nodeagent.capture.objects import PodObjects, Record
from nodeagent.capture.plan import wanted_rules
from nodeagent.capture.probe import probe
from nodeagent.capture.shared import NodeObjects
from nodeagent.pods.interfaces import collect_interfaces
from nodeagent.pods.netlink import Rtnetlink

__all__ = [
    "Record",
    "features",
    "foreign_rules",
    "pinned_pods",
    "program_name",
    "programs",
    "unguarded",
]


def features(bpf_dir: Path) -> list[Finding]:
    """Try each kernel feature that the capture needs; nothing is mounted."""
    return probe(bpf_dir, mount=False)


def pinned_pods(bpf_dir: Path) -> list[tuple[Record, int]]:
    """Return the captured pods' records, each with the id of its capture program, 0 without one.

    Raises OSError.
    """
    node = NodeObjects(bpf_dir)
    found: list[tuple[Record, int]] = []
    for directory in sorted(bpf_dir.iterdir()) if bpf_dir.is_dir() else ():
        try:
            objects = PodObjects(bpf_dir, int(directory.name, 16), node)
        except ValueError:
            continue  # what all pods share
        try:
            record = objects.record()
            if record is not None:
                found.append((record, objects.link()))
        finally:
            objects.close()
    return found


def programs() -> Iterator[tuple[int, int]]:
    """Yield namespace and id of every program that is attached to a network namespace.

    The namespace is its inode. They are programs of type sk_lookup, or flow dissectors. Raises
    OSError.
    """
    link: int | None = 0
    while link is not None and (link := _libbpf.next_link(link)) is not None:
        try:
            fd = _libbpf.open_link(link)
        except FileNotFoundError:
            continue  # gone meanwhile
        try:
            program, netns = _libbpf.link_info(fd)
        except ValueError:
            continue  # a link of another kind
        finally:
            os.close(fd)
        if netns:
            yield netns, program


def program_name(number: int) -> str:
    """Return the name of a program, as whoever loaded it calls it, empty once it is gone."""
    try:
        return _libbpf.program_name(number)
    except OSError:
        return ""


def unguarded() -> list[str]:
    """Return the devices of the calling thread's namespace where no guard of a capture drops what
    goes around the tunnel, each with the direction. Raises OSError.
    """
    with Rtnetlink() as route:
        devices = collect_interfaces(route).devices
        guards = {
            (each.device, each.direction)
            for each in read_filters(route, read_clsact(route))
            if each.is_in_place and each.name == FILTER_NAME
        }
    return [
        f"{device.name} ({direction})"
        for device in devices
        for direction in DIRECTIONS
        if (device.index, direction) not in guards
    ]


def foreign_rules() -> tuple[list[str], list[str]]:
    """Return others' routing rules in the calling thread's namespace: those that stand in the place
    of the capture's or lead to its table, and those that only come before.

    Raises OSError, also where the kernel has no policy routing.
    """
    ours = {rule for family in (V4, V6) for rule in wanted_rules(family)}
    with Rtnetlink() as route:
        found = sorted(read_rules(route) - ours)
    before = [rule for rule in found if 0 < rule.preference < PREFERENCES.start]
    place = [rule for rule in found if rule.preference in PREFERENCES or rule.table == TABLE]
    return [*map(str, place)], [str(rule) for rule in before if rule not in place]
