"""Enrolling, failing, dying, coming back, repairing and leaving without a trace."""

from __future__ import annotations

import errno
import itertools
import os
import signal
from collections.abc import Callable

import pytest

from nodeagent.capture import (
    CaptureError,
    CaptureReason,
    Listeners,
    SkLookupCapture,
    netlink_write,
)
from nodeagent.capture.actions import NetlinkAction
from nodeagent.capture.executor import PodExecutor
from nodeagent.capture.layout import INBOUND_PORT, PORTS
from nodeagent.capture.objects import PodObjects
from nodeagent.capture.shared import NodeObjects
from nodeagent.pods import NamespaceThreads, NetnsError, NetnsReason, open_netns
from support.capture_life import (
    assert_gone,
    failure,
)
from support.captured import FAMILIES, PERMISSIVE, STRICT, Captured, captured, plain

# --- whole ---------------------------------------------------------------------------------------


def test_removal_leaves_nothing(world: Captured) -> None:
    before = world.pod.dump()
    world.enrol().close()
    assert world.pod.dump() != before
    assert world.deviations() == set()

    world.run(world.capture.remove(world.uid))

    assert_gone(world, before)
    world.run(world.capture.remove(world.uid))


def test_sysctls_go_back_to_what_they_were(world: Captured) -> None:
    world.pod.sysctl("net.ipv4.conf.all.rp_filter", "2")
    world.pod.sysctl("net.ipv4.conf.eth0.rp_filter", "1")
    before = world.pod.dump()
    world.enrol().close()
    assert world.pod.sysctl("net.ipv4.conf.all.rp_filter") == "0"

    world.run(world.capture.remove(world.uid))

    assert_gone(world, before)


def test_a_clsact_qdisc_of_somebody_else_stays(world: Captured) -> None:
    world.pod.check_output("tc", "qdisc", "add", "dev", "eth0", "clsact")
    before = world.pod.dump()
    world.enrol().close()

    world.run(world.capture.remove(world.uid))

    assert_gone(world, before)


def test_enrolling_again_changes_nothing(world: Captured) -> None:
    tunnel = world.enrol()
    after = world.pod.dump()

    again = world.enrol()

    assert world.pod.dump() == after
    world.peer.connect((FAMILIES[0].pod, 80))
    again.accept("inbound")
    assert tunnel.fds != again.fds  # other descriptors of the same sockets


def test_a_pod_of_one_family_only(world: Captured) -> None:
    world.pod.ip("address del fd09::1/64 dev eth0")
    world.addresses = ("10.9.0.1",)
    before = world.pod.dump()
    world.enrol().close()
    assert "lookup 100" not in world.pod.check_output("ip", "-6", "rule")
    assert world.deviations() == set()

    world.run(world.capture.remove(world.uid))
    assert_gone(world, before)


def test_a_pod_with_ipv6_switched_off(world: Captured) -> None:
    world.pod.sysctl("net.ipv6.conf.all.disable_ipv6", "1")
    world.addresses = ("10.9.0.1",)
    before = world.pod.dump()
    tunnel = world.enrol()
    world.peer.connect((FAMILIES[0].pod, 80))
    tunnel.accept("inbound")
    tunnel.close()
    assert world.deviations() == set()

    world.run(world.capture.remove(world.uid))
    assert_gone(world, before)


def test_an_address_that_came_later_is_taken_in_by_repair(world: Captured) -> None:
    tunnel = world.enrol()
    world.pod.ip("address add 10.9.0.77/24 dev eth0")
    assert "guard_settings" in world.deviations()

    world.run(world.capture.repair(world.uid))

    assert world.deviations() == set()
    application = world.pod.listen("10.9.0.77")
    world.pod.connect(application.getsockname()[:2])
    world.pod.accept(application)
    world.peer.connect(("10.9.0.77", 80))
    assert plain(tunnel.accept("inbound").getsockname()) == ("10.9.0.77", 80)


# --- refused -------------------------------------------------------------------------------------


def test_an_address_that_is_not_there(world: Captured) -> None:
    before = world.pod.dump()
    world.addresses = ("10.9.0.1", "10.9.0.200")

    error = failure(world)

    assert error.reason is CaptureReason.ADDRESS_MISSING
    assert "10.9.0.200" in str(error)
    assert_gone(world, before)


@pytest.mark.parametrize(
    "line",
    [
        "rule add pref 100 lookup main",
        "rule add pref 5000 lookup 100",
        "-6 rule add pref 99 fwmark 0x111 lookup main",
        "route add 192.0.2.0/24 dev eth0 table 100",
    ],
)
def test_what_others_have_put_in_our_place(world: Captured, line: str) -> None:
    world.pod.ip(line)
    before = world.pod.dump()

    error = failure(world)

    assert error.reason is CaptureReason.CONFLICT
    assert "remove that first" in str(error)
    assert_gone(world, before)


@pytest.mark.parametrize("address", ["0.0.0.0", "127.0.0.1", "::1"])
def test_a_port_taken_under_permissive_is_refused_and_undone(world: Captured, address: str) -> None:
    taken = world.pod.listen(address, INBOUND_PORT)
    before = world.pod.dump()

    error = failure(world, enforcement=PERMISSIVE)

    assert error.reason is CaptureReason.PORT_TAKEN
    assert str(INBOUND_PORT) in str(error)
    assert_gone(world, before)
    taken.close()
    world.enrol(PERMISSIVE)


def test_a_port_taken_under_strict_closes_the_pod_until_it_is_free(world: Captured) -> None:
    before = world.pod.dump()
    application = world.pod.listen(FAMILIES[0].pod)
    taken = world.pod.listen("127.0.0.1", INBOUND_PORT)

    error = failure(world, enforcement=STRICT)

    assert error.reason is CaptureReason.PORT_TAKEN
    assert "closed" in str(error)
    client = world.peer.make_socket()
    client.setblocking(False)
    with pytest.raises(BlockingIOError):
        client.connect(application.getsockname())
    world.wait_count("closed_inbound")

    taken.close()
    tunnel = world.enrol(STRICT)
    assert plain(tunnel.accept("inbound").getsockname()) == application.getsockname()
    tunnel.close()
    application.close()
    world.run(world.capture.remove(world.uid))
    assert_gone(world, before)


def test_the_nodes_own_namespace_is_refused() -> None:
    with pytest.raises(NetnsError) as caught:
        open_netns("/proc/self/ns/net")
    assert caught.value.reason is NetnsReason.NODE


def test_files_that_are_no_namespace_are_refused() -> None:
    for path in ("/etc/hostname", "/proc/self/ns/mnt"):
        with pytest.raises(NetnsError) as caught:
            open_netns(path)
        assert caught.value.reason is NetnsReason.NOT_A_NAMESPACE


# --- half-way ------------------------------------------------------------------------------------


def interrupt(monkeypatch: pytest.MonkeyPatch, at: int, act: Callable[[], None]) -> None:
    """Call `act` before the `at`th step of an enrolment, counted from 1."""
    steps = itertools.count(1)

    def before(original: Callable[..., object]) -> Callable[..., object]:
        def wrapper(*args: object) -> object:
            if next(steps) == at:
                act()
            return original(*args)

        return wrapper

    monkeypatch.setattr(PodExecutor, "do", before(PodExecutor.do))
    monkeypatch.setattr(PodExecutor, "write", before(PodExecutor.write))
    monkeypatch.setattr(PodObjects, "_pin", before(PodObjects._pin))
    monkeypatch.setattr(NodeObjects, "_pin", before(NodeObjects._pin))
    monkeypatch.setattr(NodeObjects, "claim", before(NodeObjects.claim))


def break_down() -> None:
    raise OSError(errno.EIO, "broken for the test")


def enrol_and_break(world: Captured, at: int) -> CaptureError | None:
    """Enrol with step `at` broken. Returns the error, None if there are fewer steps."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt(monkeypatch, at, break_down)
        try:
            world.enrol()
        except CaptureError as error:
            return error
    return None


def test_a_failure_at_any_step_is_undone(world: Captured) -> None:
    world.pod.listen(FAMILIES[0].pod)
    before = world.pod.dump()
    at = 1
    while (error := enrol_and_break(world, at)) is not None:
        assert error.reason is CaptureReason.KERNEL
        assert "broken for the test" in str(error)
        assert world.pod.dump() == before, f"step {at}"
        assert world.pins() == [], f"step {at}"
        at += 1
    assert at > 20


def refuse(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Make the kernel refuse the `at`th change of routing or filters, counted from 1."""
    numbers = itertools.count(1)
    encode = netlink_write.encode

    def spoilt(action: NetlinkAction, guard: netlink_write.Guard | None) -> bytes:
        message = bytearray(encode(action, guard))
        if next(numbers) == at:
            message[4:6] = b"\xff\x7f"  # a message type that rtnetlink does not know
        return bytes(message)

    monkeypatch.setattr(netlink_write, "encode", spoilt)


def test_a_change_refused_by_the_kernel_undoes_the_whole_batch(world: Captured) -> None:
    before = world.pod.dump()
    for at in range(1, 16):
        with pytest.MonkeyPatch.context() as monkeypatch:
            refuse(monkeypatch, at)
            error = failure(world)
        assert error.reason is CaptureReason.KERNEL
        assert "missing" in str(error) or "guard" in str(error) or "clsact" in str(error)
        assert_gone(world, before)
    world.enrol()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def enrol_and_die(world: Captured, at: int) -> bool:
    """Enrol in a child that is killed before step `at`. Returns whether it was."""
    child = os.fork()
    if child == 0:
        try:
            with pytest.MonkeyPatch.context() as monkeypatch:
                interrupt(monkeypatch, at, die)
                world.threads = NamespaceThreads()
                world.capture = SkLookupCapture(world.bpf_dir, world.threads)
                world.run(world.capture.enrol(world.spec(STRICT)))
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("then", ["enrol", "remove"])
def test_kill9_at_each_step(then: str) -> None:
    at, killed = 0, True
    while killed:
        at += 1
        with captured() as world:
            world.pod.listen(FAMILIES[0].pod)
            before = world.pod.dump()
            killed = enrol_and_die(world, at)
            found = world.run(world.capture.recover())
            assert [item.uid for item in found] in ([], [world.uid]), f"step {at}"
            if then == "enrol":
                tunnel = world.enrol()
                assert world.deviations() == set(), f"step {at}"
                world.peer.connect((FAMILIES[0].pod, 80))
                tunnel.accept("inbound")
                tunnel.close()
            world.run(world.capture.remove(world.uid))
            assert world.pod.dump() == before, f"step {at}"
            assert world.pins() == [], f"step {at}"
    assert at > 20


# --- coming back ---------------------------------------------------------------------------------


def test_a_restarted_agent_adopts_without_interrupting(world: Captured) -> None:
    tunnel = world.enrol()
    before = world.peer.connect((FAMILIES[0].pod, 80))
    held = tunnel.accept("inbound")

    world.restart()
    between = world.peer.connect((FAMILIES[0].pod, 81))
    (found,) = world.run(world.capture.recover())
    assert (found.uid, found.alive, found.listening) == (world.uid, True, True)
    assert world.deviations() == set()
    assert world.run(world.capture.set_enforcement(world.uid, STRICT)) == 0
    assert failure(world).reason is CaptureReason.LISTENERS_HELD

    again = world.enrol(STRICT, tunnel.fds)

    assert world.deviations() == set()
    taken = again.accept("inbound")
    assert plain(taken.getpeername()) == between.getsockname()
    before.sendall(b"on")
    assert held.recv(2) == b"on"


def test_a_restarted_agent_without_a_tunnel_opens_new_sockets(world: Captured) -> None:
    world.enrol().close()
    world.restart()
    (found,) = world.run(world.capture.recover())
    assert (found.alive, found.listening) == (True, False)

    tunnel = world.enrol()

    world.peer.connect((FAMILIES[0].pod, 80))
    tunnel.accept("inbound")


def test_sockets_that_do_not_fit_are_not_adopted(world: Captured) -> None:
    elsewhere = [world.peer.listen("::", port).fileno() for port in PORTS]
    plain_ones = [world.pod.listen("::", port) for port in PORTS]
    fd = world.handle.fd
    right_place = Listeners(*(sock.fileno() for sock in plain_ones))
    before = world.pod.dump()

    for adopt, said in (
        (Listeners(*elsewhere), "another namespace"),
        (right_place, "mark"),
        (Listeners(*reversed(right_place)), "elsewhere"),
        (Listeners(fd, fd, fd), "no socket"),
    ):
        error = failure(world, adopt=adopt)
        assert error.reason is CaptureReason.BAD_REQUEST
        assert said in str(error)
    assert_gone(world, before)


def test_a_namespace_that_has_gone_leaves_only_pins_to_remove(world: Captured) -> None:
    world.enrol().close()
    world.restart()
    world.pod.check_output("ip", "netns", "delete", world.pod.name)

    (found,) = world.run(world.capture.recover())
    assert not found.alive
    world.run(world.capture.remove(found.uid))

    assert world.pins() == []
