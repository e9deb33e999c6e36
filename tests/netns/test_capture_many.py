"""Many pods on one node: what each of them costs is counted, not timed."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nodeagent.capture import PodSpec, SkLookupCapture, _libbpf
from nodeagent.capture.bpffs import ensure_bpffs
from nodeagent.capture.shared import NodeObjects
from nodeagent.pods import NamespaceThreads, NetnsHandle, open_netns, pod_uid
from nodeagent.pods.netlink import Rtnetlink
from support.captured import STRICT
from support.netns import Namespace, namespace

PODS = 60

_numbers = itertools.count()


@pytest.fixture(scope="module")
def pods() -> Iterator[list[Namespace]]:
    with contextlib.ExitStack() as stack:
        spaces = [stack.enter_context(namespace("many")) for _ in range(PODS)]
        for index, space in enumerate(spaces):
            space.ip(
                "link set lo up",
                "link add eth0 type veth peer name far",
                "link set far up",
                "link set eth0 up",
                f"address add 10.9.8.{index + 1}/32 dev eth0",
            )
        yield spaces


class Node:
    """A capture, and handles of the pods as a watcher has them."""

    def __init__(self, spaces: list[Namespace]) -> None:
        self.bpf_dir = Path(f"/sys/fs/bpf/nat-{os.getpid():x}-many-{next(_numbers)}")
        ensure_bpffs(self.bpf_dir)
        self.runner = asyncio.Runner()
        self.runner.get_loop()  # opens its descriptors now
        self.threads = NamespaceThreads()
        self.capture = SkLookupCapture(self.bpf_dir, self.threads)
        self.handles: list[NetnsHandle] = [open_netns(space.name) for space in spaces]

    def spec(self, index: int) -> PodSpec:
        handle = self.handles[index]
        uid = pod_uid(f"default/many-{index}", handle.cookie)
        return PodSpec(uid, handle, (f"10.9.8.{index + 1}",), STRICT)

    def all(self, first: int = 0) -> None:
        async def enrol() -> None:
            chosen = range(first, len(self.handles))
            await asyncio.gather(*(self.capture.enrol(self.spec(index)) for index in chosen))

        self.runner.run(enrol())

    def remove(self) -> None:
        for index in range(len(self.handles)):
            self.runner.run(self.capture.remove(self.spec(index).uid))

    def close(self) -> None:
        self.remove()
        self.runner.run(self.capture.close())
        self.runner.close()
        self.threads.close()
        for handle in self.handles:
            handle.close()
        shutil.rmtree(self.bpf_dir, ignore_errors=True)


@pytest.fixture
def node(pods: list[Namespace]) -> Iterator[Node]:
    made = Node(pods)
    try:
        yield made
    finally:
        made.close()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - counted, not read


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count what each pod may need once, and what all pods need once."""
    counted: Counter[str] = Counter()
    lock = threading.Lock()

    def counting(name: str, original: Callable[..., object]) -> Callable[..., object]:
        def wrapper(*args: object) -> object:
            with lock:
                counted[name] += 1
            return original(*args)

        return wrapper

    for owner, name in (
        (_libbpf, "load_sk_lookup"),
        (_libbpf, "create_map"),
        (NodeObjects, "_load"),
        (Rtnetlink, "_dump"),
        (Rtnetlink, "_change"),
    ):
        monkeypatch.setattr(owner, name, counting(name, getattr(owner, name)))
    return counted


def test_what_a_pod_costs_is_bounded(node: Node, calls: Counter[str]) -> None:
    node.runner.run(node.capture.enrol(node.spec(0)))
    node.runner.run(node.capture.audit(node.spec(0).uid))
    threads, open_before = threading.active_count(), descriptors()
    calls.clear()

    node.all(first=1)

    more = PODS - 1
    # One small program and one map (the record) for each; the guard and its maps are there.
    assert calls["load_sk_lookup"] == more
    assert calls["create_map"] == more
    assert calls["_load"] == 0
    # Links, addresses, qdiscs, rules and routes; no filters before there is a guard.
    assert calls["_dump"] == 5 * more
    # Routing and the guard in one batch.
    assert calls["_change"] == more
    # Three listening sockets; the namespace's descriptor is the watcher's.
    assert descriptors() - open_before == 3 * more
    assert threading.active_count() <= threads + 1


def test_an_audit_of_a_healthy_pod_only_reads(node: Node, calls: Counter[str]) -> None:
    node.all()
    open_before = descriptors()
    calls.clear()

    for index in range(PODS):
        assert node.runner.run(node.capture.audit(node.spec(index).uid)) == []

    # The guard's filters, both ways on two devices, beside what enrolment reads.
    assert calls == Counter({"_dump": 9 * PODS})
    assert descriptors() == open_before


def test_all_of_them_leave_nothing(node: Node, pods: list[Namespace]) -> None:
    before = [space.check_output("ip", "rule") for space in pods]
    open_before = descriptors()
    node.all()
    assert len({space.check_output("ip", "rule") for space in pods}) == 1
    assert pods[0].check_output("ip", "rule") != before[0]

    node.remove()

    assert [space.check_output("ip", "rule") for space in pods] == before
    assert list(node.bpf_dir.iterdir()) == []
    assert descriptors() == open_before
