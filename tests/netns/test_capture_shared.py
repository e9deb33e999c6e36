"""What pods share in the kernel: the guard, the maps, the numbers; and pins of agents before."""

from __future__ import annotations

import contextlib
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from nodeagent.capture import CaptureReason, PodSpec, _libbpf
from nodeagent.capture.layout import RECORD_SIZE, SLOTS, pack_settings
from nodeagent.capture.objects import PodObjects, Record
from nodeagent.capture.shared import DIRECTORY, NodeObjects
from nodeagent.pods import NetnsHandle, open_netns, pod_uid
from support.capture_life import assert_gone, failure
from support.captured import FAMILIES, PERMISSIVE, STRICT, Captured, plain
from support.netns import Namespace, namespace

ZERO = struct.pack("I", 0)


@contextlib.contextmanager
def second(world: Captured) -> Iterator[tuple[PodSpec, Namespace]]:
    """Make another pod of the same node, with a device of its own, strict."""
    with namespace("second") as space:
        space.ip(
            "link add eth0 type veth peer name far",
            "link set lo up",
            "link set far up",
            "link set eth0 up",
            "address add 10.9.7.1/24 dev eth0",
        )
        handle = open_netns(space.name)
        try:
            uid = pod_uid("default/second", handle.cookie)
            yield PodSpec(uid, handle, ("10.9.7.1",), STRICT), space
        finally:
            handle.close()


def record_of(world: Captured, handle: NetnsHandle) -> Record:
    node = NodeObjects(world.bpf_dir)
    objects = PodObjects(world.bpf_dir, handle.cookie, node)
    try:
        found = objects.record()
        assert found is not None
        return found
    finally:
        objects.close()
        node.close()


def test_pods_share_the_guard_and_nothing_that_tells_them_apart(world: Captured) -> None:
    world.enrol(PERMISSIVE)
    with second(world) as (spec, space):
        world.run(world.capture.enrol(spec))
        shown = [
            each.check_output("tc", "filter", "show", "dev", "eth0", "egress")
            for each in (world.pod, space)
        ]
        numbers = {record_of(world, handle).number for handle in (world.handle, spec.netns)}

        assert len(numbers) == 2
        assert len({text.split(" id ")[1].split()[0] for text in shown}) == 1
        told = [text.split("flowid ")[1].split()[0].rpartition(":")[2] for text in shown]
        assert {int(number, 16) for number in told} == numbers
        assert world.deviations() == set()
        assert world.run(world.capture.audit(spec.uid)) == []

        world.run(world.capture.remove(spec.uid))
    # The one that stays is served as before.
    application = world.pod.listen(FAMILIES[0].pod)
    tunnel = world.enrol(PERMISSIVE)
    world.peer.connect(application.getsockname())
    assert plain(tunnel.accept("inbound").getsockname()) == application.getsockname()
    tunnel.close()
    world.run(world.capture.remove(world.uid))
    assert world.pins() == []


def test_a_guard_that_is_told_another_pod_is_put_right(world: Captured) -> None:
    world.enrol()
    number = record_of(world, world.handle).number
    node = NodeObjects(world.bpf_dir)
    with contextlib.closing(node):
        stray = world.bpf_dir / "stray"
        _libbpf.pin(node.guard("egress"), str(stray))
    wrong = f"classid 0:{number + 1:x} object-pinned {stray}"
    ours = "tc filter replace dev eth0 egress prio 1 handle 1 bpf direct-action"
    world.pod.check_output(*ours.split(), *wrong.split())
    stray.unlink()
    assert world.deviations() >= {"guard_missing"}

    world.run(world.capture.repair(world.uid))

    assert world.deviations() == set()


def test_a_pod_that_the_maps_do_not_have_is_closed(world: Captured) -> None:
    application = world.pod.listen(FAMILIES[0].pod)
    world.enrol(PERMISSIVE)
    node = NodeObjects(world.bpf_dir)
    with contextlib.closing(node):
        node.release(record_of(world, world.handle).number, world.handle.cookie)
    client = world.peer.make_socket()
    client.setblocking(False)
    with pytest.raises(BlockingIOError):
        client.connect(application.getsockname())
    application.settimeout(0.2)
    with pytest.raises(TimeoutError):
        application.accept()
    own = world.pod.make_socket()
    own.settimeout(0.2)
    with pytest.raises(OSError):  # noqa: PT011 - nothing takes it, one way or the other
        own.connect((FAMILIES[0].peer, 80))

    world.run(world.capture.repair(world.uid))

    assert world.deviations() == set()


def test_a_number_left_by_a_killed_agent_is_free_again(world: Captured) -> None:
    world.bpf_dir.mkdir(exist_ok=True)
    node = NodeObjects(world.bpf_dir)
    with contextlib.closing(node):
        number = node.claim(0xABCDEF)
        assert node.owns(number, 0xABCDEF)
        world.enrol()
        assert record_of(world, world.handle).number != number
        world.restart()
        world.run(world.capture.recover())
        assert not node.owns(number, 0xABCDEF)
        assert node.owns(record_of(world, world.handle).number, world.handle.cookie)


def test_the_shared_maps_may_be_lost_without_opening_anything(world: Captured) -> None:
    tunnel = world.enrol()
    shutil.rmtree(world.bpf_dir / DIRECTORY)
    world.restart()
    (found,) = world.run(world.capture.recover())
    assert found.uid == world.uid
    assert "program_detached" in world.deviations()

    again = world.enrol(STRICT, tunnel.fds)

    assert world.deviations() == set()
    world.peer.connect((FAMILIES[0].pod, 80))
    again.accept("inbound")


def make_old(world: Captured, listeners: tuple[int, ...]) -> None:
    """Leave the pins that agents before this one left: maps for each pod, and no number."""
    directory = world.bpf_dir / f"{world.handle.cookie:x}"
    record = msgspec.structs.asdict(record_of(world, world.handle))
    del record["number"]
    record["clsact"] = sorted(record["clsact"])
    data = msgspec.json.encode(record).ljust(RECORD_SIZE, b"\0")
    _put(directory, "record", (_libbpf.MAP_TYPE_ARRAY, 4, RECORD_SIZE, 1), {ZERO: data})
    settings = pack_settings(strict_default=True, exceptions=())
    _put(directory, "settings", (_libbpf.MAP_TYPE_ARRAY, 4, len(settings), 1), {ZERO: settings})
    sockets = {struct.pack("I", slot): struct.pack("Q", listeners[slot]) for slot in range(SLOTS)}
    _put(directory, "slots", (_libbpf.MAP_TYPE_SOCKMAP, 4, 8, SLOTS), sockets)
    (capture,) = directory.glob("capture_*")
    capture.rename(directory / "capture_0123456789ab")
    shutil.rmtree(world.bpf_dir / DIRECTORY)


def _put(
    directory: Path, name: str, shape: tuple[int, int, int, int], entries: dict[bytes, bytes]
) -> None:
    kind, key, value, most = shape
    fd = _libbpf.create_map(kind, name, key, value, most)
    for where, what in entries.items():
        _libbpf.update_map(fd, where, what)
    (directory / name).unlink(missing_ok=True)
    _libbpf.pin(fd, str(directory / name))


def test_pins_of_an_agent_before_are_taken_over_in_place(world: Captured) -> None:
    before = world.pod.dump()
    tunnel = world.enrol()
    held_before = world.peer.connect((FAMILIES[0].pod, 80))
    held = tunnel.accept("inbound")
    make_old(world, tuple(tunnel.fds))
    world.restart()

    (found,) = world.run(world.capture.recover())
    assert (found.uid, found.alive, found.listening) == (world.uid, True, True)
    assert world.run(world.capture.set_enforcement(world.uid, STRICT)) == 0
    assert failure(world).reason is CaptureReason.LISTENERS_HELD
    again = world.enrol(STRICT, tunnel.fds)

    assert world.deviations() == set()
    held_before.sendall(b"on")
    assert held.recv(2) == b"on"
    world.peer.connect((FAMILIES[0].pod, 81))
    again.accept("inbound")
    names = {name.partition("_")[0] for name in world.pins()}
    own = f"{world.handle.cookie:x}"
    assert {name.removeprefix(f"{own}/") for name in names if name.startswith(f"{own}/")} == {
        "record",
        "link",
        "capture",
    }
    again.close()
    tunnel.close()
    world.run(world.capture.remove(world.uid))
    assert_gone(world, before)
