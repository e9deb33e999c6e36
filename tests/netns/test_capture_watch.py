"""Following namespaces that come, go and are made anew."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from nodeagent.pods import (
    AddressesMissingError,
    Appeared,
    Change,
    Gone,
    NamespaceThreads,
    PodWatcher,
    Unusable,
    open_netns,
    pod_uid,
    read_interfaces,
    wait_for_addresses,
)
from support.netns import DEADLINE, Namespace, namespace, veth


@pytest.fixture
def threads() -> Iterator[NamespaceThreads]:
    made = NamespaceThreads()
    yield made
    made.close()


async def following(changes: AsyncIterator[Change]) -> Change:
    async with asyncio.timeout(DEADLINE):
        return await anext(changes)


def add(name: str) -> None:
    subprocess.run(["ip", "netns", "add", name], check=True)


def delete(name: str) -> None:
    subprocess.run(["ip", "netns", "delete", name], check=True)


def test_churn_reuses_a_name_and_an_inode_but_no_uid(threads: NamespaceThreads) -> None:
    async def follow(name: str) -> None:
        watcher = PodWatcher(threads, poll=0.02)
        changes = watcher.changes()
        watcher.set_bindings({"default/a": name})
        uids, inodes = set(), set()
        for _ in range(4):
            appeared = await following(changes)
            assert isinstance(appeared, Appeared)
            assert appeared.uid == pod_uid("default/a", appeared.netns.cookie)
            uids.add(appeared.uid)
            inodes.add(appeared.netns.inode)
            appeared.netns.close()
            delete(name)
            add(name)
            assert await following(changes) == Gone(appeared.uid, "default/a")
        assert len(uids) == 4
        await changes.aclose()  # type: ignore[attr-defined]  # a generator

    with namespace("churn") as made:
        asyncio.run(follow(made.name))


def test_a_namespace_that_comes_later(threads: NamespaceThreads) -> None:
    async def follow(made: Namespace) -> None:
        delete(made.name)
        watcher = PodWatcher(threads, poll=0.02)
        changes = watcher.changes()
        watcher.set_bindings({"default/a": made.name})
        missing = await following(changes)
        assert isinstance(missing, Unusable)
        assert ("does not exist" in missing.error, missing.absent) == (True, True)
        add(made.name)
        appeared = await following(changes)
        assert isinstance(appeared, Appeared)
        appeared.netns.close()
        watcher.set_bindings({})
        assert await following(changes) == Gone(appeared.uid, "default/a")
        await changes.aclose()  # type: ignore[attr-defined]  # a generator

    with namespace("later") as made:
        asyncio.run(follow(made))


def test_two_workloads_in_one_namespace(threads: NamespaceThreads) -> None:
    async def follow(made: Namespace) -> None:
        watcher = PodWatcher(threads, poll=0.02)
        changes = watcher.changes()
        watcher.set_bindings({"default/a": made.name, "default/b": str(made.path)})
        appeared = await following(changes)
        refused = await following(changes)
        assert isinstance(appeared, Appeared)
        appeared.netns.close()
        assert isinstance(refused, Unusable)
        assert "already bound to workload default/a" in refused.error
        assert not refused.absent
        # The node's own is one that there is.
        watcher.set_bindings({"default/c": "/proc/self/ns/net"})
        changed = [await following(changes) for _ in range(2)]
        (own,) = (each for each in changed if isinstance(each, Unusable))
        assert ("the node's own" in own.error, own.absent) == (True, False)
        await changes.aclose()  # type: ignore[attr-defined]  # a generator

    with namespace("shared") as made:
        asyncio.run(follow(made))


def test_interfaces_and_waiting_for_addresses(threads: NamespaceThreads) -> None:
    async def look(made: Namespace, then: Callable[[], None]) -> None:
        handle = open_netns(str(made.path))
        found = await read_interfaces(threads, handle)
        assert [device.name for device in found.devices] == ["eth0"]
        assert {address.text for address in found.addresses} == {"10.9.0.1", "fd09::1"}
        with pytest.raises(AddressesMissingError, match=r"10\.9\.0\.7"):
            await wait_for_addresses(threads, handle, ("10.9.0.1", "10.9.0.7"), seconds=0)
        waiting = asyncio.create_task(wait_for_addresses(threads, handle, ("10.9.0.1", "10.9.0.7")))
        await asyncio.to_thread(then)
        assert (await waiting).missing(("10.9.0.7",)) == ()
        handle.close()

    with namespace("a") as made, namespace("b") as other:
        veth(made, other, ["10.9.0.1/24", "fd09::1/64"], ["10.9.0.2/24"])
        asyncio.run(look(made, lambda: made.ip("address add 10.9.0.7/24 dev eth0")))


def test_duplicate_detection_is_waited_for(threads: NamespaceThreads) -> None:
    async def look(made: Namespace) -> None:
        handle = open_netns(made.name)
        assert (await read_interfaces(threads, handle)).addresses == ()
        found = await wait_for_addresses(threads, handle, ("fd09::1",))
        assert [address.text for address in found.addresses] == ["fd09::1"]
        handle.close()

    with namespace("dad") as made, namespace("b") as other:
        veth(made, other)
        made.sysctl("net.ipv6.conf.eth0.accept_dad", "1")
        made.ip("-6 address add fd09::1/64 dev eth0")
        asyncio.run(look(made))
