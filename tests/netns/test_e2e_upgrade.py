"""Both daemons are replaced again and again, and no connection notices."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from nodeagent.control import MAX_DRAINING
from nodeagent.lab import Lab, namespaces, processes
from nodeagent.lab.launch import Place
from support.e2e import Mesh, read_all, running, spec, strict, watched
from support.netns import DEADLINE, wait_until

NODES: Final = ("node-1", "node-2")
ROUNDS: Final = 10
"""Of each node, in turn: twenty in a row."""

CHUNK: Final = 4096
PAUSE: Final = 0.02
"""Seconds between two exchanges of a loop: the daemons that start need the processors too."""

HANG_SECONDS: Final = 30.0
"""For one step of a connection under load: longer than anything that ends by itself here."""


@pytest.fixture(scope="module")
def shared() -> Iterator[Lab]:
    with running(spec(apps=False, pods=("client", "near", "far", "outsider"))) as made:
        yield made


@pytest.fixture
def mesh(shared: Lab, request: pytest.FixtureRequest) -> Iterator[Mesh]:
    with watched(shared, request) as made:
        yield made


# --- upgrades -------------------------------------------------------------------------------------


def tunnel(mesh: Mesh, node: str) -> dict[str, Any]:
    found: dict[str, Any] = mesh.status(node)["ztunnel"]
    return found


def send(pid: int, number: signal.Signals) -> None:
    """Signal a process and, if it is to be killed, wait until its last thread has ended."""
    watch = os.pidfd_open(pid)
    signal.pidfd_send_signal(watch, number)
    if number == signal.SIGKILL:
        assert select.select([watch], [], [], DEADLINE)[0]
    os.close(watch)


def serves(mesh: Mesh, node: str, than: int) -> bool:
    """Whether another process than `than` serves, and says that it is ready."""
    found = tunnel(mesh, node)
    return bool(found["connected"] and found["pid"] != than and mesh.ready(node))


def upgrade(mesh: Mesh, node: str) -> int:
    """Reload ztunnel; return the process that is replaced."""
    pid: int = tunnel(mesh, node)["pid"]
    send(pid, signal.SIGHUP)
    wait_until(partial(serves, mesh, node, pid), f"a successor serves on {node}")
    return pid


def start_beside(mesh: Mesh, node: str, like: Path) -> None:
    """Start a ztunnel as another did (its command line), whoever runs already."""
    argv = like.read_text().rstrip("\0").split("\0")
    layout = mesh.lab.layout
    place = Place(str(layout.node_space(node)))
    processes.start(place, argv, layout.log(f"{node}/ztunnel"), lambda _: None)


def drains(mesh: Mesh, node: str) -> list[int]:
    return [each["pid"] for each in tunnel(mesh, node)["draining"]]


def only_drain(mesh: Mesh, node: str, *pids: int) -> bool:
    return drains(mesh, node) == list(pids)


def forget_drains(mesh: Mesh) -> None:
    """Wait until nobody drains any more: what a test held has been closed."""
    for node in NODES:
        wait_until(partial(only_drain, mesh, node), f"nobody drains on {node}")


# --- load -----------------------------------------------------------------------------------------


class Load:
    """Connections between pods, until `stop`; `wrong` is what one of them met."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._listeners: dict[str, socket.socket] = {}
        self.wrong: list[str] = []
        self.turns: dict[str, int] = {}

    def listen(self, pod: str) -> None:
        listener = self._mesh.listen(pod)
        listener.settimeout(None)
        self._listeners[pod] = listener
        threading.Thread(target=self._serve, args=(listener,), daemon=True).start()

    def _serve(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                app, _ = listener.accept()
                threading.Thread(target=self._echo, args=(app,), daemon=True).start()

    @staticmethod
    def _echo(app: socket.socket) -> None:
        # What goes wrong here the other end sees too.
        with app, contextlib.suppress(OSError):
            while data := app.recv(65536):
                app.sendall(data)

    def _open(self, client: str, server: str) -> socket.socket:
        kind = socket.socket
        sock = namespaces.run_in(self._mesh.space(client), lambda: kind(socket.AF_INET))
        sock.settimeout(HANG_SECONDS)
        port = self._listeners[server].getsockname()[1]
        sock.connect((self._mesh.address(server), port))
        return sock

    @staticmethod
    def _exchange(sock: socket.socket) -> None:
        said = os.urandom(CHUNK)
        sock.sendall(said)
        heard = b""
        while len(heard) < CHUNK and (data := sock.recv(CHUNK)):
            heard += data
        if heard != said:
            raise ValueError(f"{len(heard)} of {CHUNK} bytes came back, or other ones")

    def _long(self, client: str, server: str) -> None:
        with self._open(client, server) as sock:
            while not self._stop.is_set():
                self._exchange(sock)
                self._turn(f"long {client}")
                self._stop.wait(PAUSE)

    def _short(self, client: str, server: str) -> None:
        while not self._stop.is_set():
            with self._open(client, server) as sock:
                self._exchange(sock)
                sock.shutdown(socket.SHUT_WR)
                if read_all(sock):
                    raise ValueError("more bytes than were sent")
            self._turn(f"short {client}")
            self._stop.wait(PAUSE)

    def _turn(self, name: str) -> None:
        self.turns[name] = self.turns.get(name, 0) + 1

    def start(self, client: str, server: str, *, long: bool = False) -> None:
        work = self._long if long else self._short
        thread = threading.Thread(target=self._guard, args=(work, client, server))
        self._threads.append(thread)
        thread.start()

    def _guard(self, work: Callable[[str, str], None], client: str, server: str) -> None:
        try:
            work(client, server)
        except (OSError, ValueError) as error:
            self.wrong.append(f"{work.__name__} {client} to {server}: {error!r}")

    def moved(self) -> Callable[[], bool]:
        """Return whether every loop has gone round since now, or something is wrong."""
        before = dict(self.turns)

        def check() -> bool:
            moved = all(self.turns[name] > before.get(name, 0) for name in self.turns)
            return bool(self.wrong) or (moved and len(self.turns) == len(self._threads))

        return check

    def close(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * HANG_SECONDS)
        for listener in self._listeners.values():
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def load(mesh: Mesh) -> Iterator[Load]:
    """Mutual TLS both ways between the nodes, long and short connections; and plaintext."""
    made = Load(mesh)
    made.listen("far")
    made.listen("near")
    try:
        made.start("client", "far", long=True)
        made.start("far", "near", long=True)
        made.start("client", "far")
        made.start("far", "near")
        made.start("outsider", "far")
        wait_until(made.moved(), "the load runs")
        yield made
        assert not made.wrong
    finally:
        made.close()


@pytest.mark.slow
def test_twenty_upgrades_of_ztunnel_in_a_row(mesh: Mesh) -> None:
    with load(mesh) as running_load:
        first = {node: tunnel(mesh, node)["pid"] for node in NODES}
        for turn in range(2 * ROUNDS):
            node = NODES[turn % 2]
            upgrade(mesh, node)
            wait_until(running_load.moved(), f"the load goes on after upgrade {turn}")
            assert not running_load.wrong
            # The first still carries the long connections; the others have ended.
            wait_until(partial(only_drain, mesh, node, first[node]), "only the first drains")
    forget_drains(mesh)
    for node in NODES:
        logs = mesh.lab.node(node).logs("nodeagent")
        assert logs.count("ztunnel has drained") == ROUNDS


@pytest.mark.slow
def test_twenty_restarts_of_nodeagent_in_a_row(mesh: Mesh) -> None:
    with load(mesh) as running_load:
        for turn in range(2 * ROUNDS):
            # In turn asked to end, and killed.
            name = NODES[turn % 2]
            node = mesh.lab.node(name)
            if turn % 4 < 2:
                send(node.process("nodeagent").pid, signal.SIGKILL)
            node.restart("nodeagent", wait=False)
            wait_until(running_load.moved(), f"the load goes on after restart {turn}")
            wait_until(partial(mesh.ready, name, "nodeagent"), f"nodeagent is back on {name}")
            assert not running_load.wrong


def test_a_reload_of_nodeagent_reads_settings_only_if_they_can_be_used(mesh: Mesh) -> None:
    node = mesh.lab.node("node-2")
    settings = mesh.lab.layout.settings("node-2")
    before = settings.read_text()
    process = node.process("nodeagent")
    watch = process.open()
    assert watch is not None
    listener = mesh.listen("far")
    sock, app, _ = mesh.call("client", "far", listener=listener)
    try:
        settings.write_text(f"{before}\nno_such_setting: 1\n")
        process.send(signal.SIGHUP)
        wait_until(lambda: "reload refused" in node.logs("nodeagent"), "it is refused")
        assert "no_such_setting" in node.logs("nodeagent")
        assert mesh.ready("node-2", "nodeagent")
        settings.write_text(before)
        process.send(signal.SIGHUP)
        assert select.select([watch], [], [], DEADLINE)[0]
        mesh.carries(sock, app)
    finally:
        os.close(watch)
        settings.write_text(before)
        # In the service manager's place.
        node.restart("nodeagent")
    mesh.carries(sock, app)


# --- while one drains -----------------------------------------------------------------------------


def test_a_policy_cuts_what_the_replaced_one_carries(mesh: Mesh) -> None:
    listener = mesh.listen("far")
    mutual = mesh.call("client", "far", listener=listener)[:2]
    plain = mesh.call("outsider", "far", listener=listener)[:2]
    for near, app in (mutual, plain):
        mesh.carries(near, app)
    old = upgrade(mesh, "node-2")
    assert drains(mesh, "node-2") == [old]
    mesh.policy("far", strict(), mode="STRICT")
    with pytest.raises(ConnectionResetError):
        plain[0].recv(1)
    mesh.carries(*mutual)
    line = mesh.line("far", "inbound", listener.getsockname()[1], reason="policy_changed")
    assert line["src.addr"].startswith(mesh.address("outsider"))
    # The successor refuses new ones as well.
    mesh.refuses("outsider", mesh.address("far"), listener.getsockname()[1])
    mesh.carries(*mutual)
    for sock in mutual:
        sock.close()
    forget_drains(mesh)


def test_a_restarted_nodeagent_finds_the_one_that_drains(mesh: Mesh) -> None:
    listener = mesh.listen("far")
    sock, app, port = mesh.call("client", "far", listener=listener)
    old = upgrade(mesh, "node-2")
    mesh.lab.node("node-2").restart("nodeagent")
    wait_until(lambda: drains(mesh, "node-2") == [old], "it is found again")
    assert tunnel(mesh, "node-2")["pid"] != old
    mesh.carries(sock, app)
    # And it is told what changes: its pod goes, and what it carries with it.
    mesh.lab.enrol("shop/far", enrolled=False)
    with pytest.raises(ConnectionResetError):
        sock.recv(1)
    mesh.lab.enrol("shop/far")
    mesh.settled("node-2", lambda s: [p["state"] for p in s["pods"]] == ["Enrolled"])
    again, served, _ = mesh.call("client", "far", listener=listener)
    mesh.carries(again, served)
    for each in (sock, app, again, served):
        each.close()
    assert port
    forget_drains(mesh)


def test_a_crash_costs_only_what_the_crashed_one_carried(mesh: Mesh) -> None:
    listener = mesh.listen("far")
    kept = mesh.call("client", "far", listener=listener)[:2]
    upgrade(mesh, "node-2")
    lost = mesh.call("client", "far", listener=listener)[:2]
    mesh.carries(*lost)
    pid = tunnel(mesh, "node-2")["pid"]
    command = mesh.lab.layout.log("node-2/ztunnel").with_name("cmdline")
    command.write_bytes(Path(f"/proc/{pid}/cmdline").read_bytes())
    send(pid, signal.SIGKILL)
    for end in lost:
        with pytest.raises(ConnectionResetError):
            end.recv(1)
    waiting = mesh.connect("client", mesh.address("far"), listener.getsockname()[1])
    waiting.sendall(b"ping")
    mesh.carries(*kept)
    start_beside(mesh, "node-2", command)
    app, _ = mesh.accept(listener)
    assert app.recv(4) == b"ping"
    app.sendall(b"pong")
    assert waiting.recv(4) == b"pong"
    mesh.carries(*kept)
    for each in (*kept, waiting, app):
        each.close()
    wait_until(partial(serves, mesh, "node-2", pid), "the third serves")
    forget_drains(mesh)


def test_the_oldest_of_too_many_is_ended(mesh: Mesh) -> None:
    listener = mesh.listen("far")
    carried = []
    for _ in range(MAX_DRAINING + 1):
        carried.append(mesh.call("client", "far", listener=listener)[:2])
        mesh.carries(*carried[-1])
        upgrade(mesh, "node-2")
    for end in carried.pop(0):
        with pytest.raises(ConnectionResetError):
            end.recv(1)
    for each in carried:
        mesh.carries(*each)
    assert len(drains(mesh, "node-2")) == MAX_DRAINING
    for near, app in carried:
        near.close()
        app.close()
    forget_drains(mesh)


def test_the_deadline_cuts_what_is_left_and_is_counted(mesh: Mesh) -> None:
    settings = mesh.lab.layout.settings("node-2")
    before = settings.read_text()
    listener = mesh.listen("far")
    sock, app, port = mesh.call("client", "far", listener=listener)
    mesh.carries(sock, app)
    try:
        settings.write_text(f"{before}\ndeadlines:\n  drain: 1\n")
        mesh.lab.node("node-2").restart("nodeagent")
        mesh.settled("node-2", lambda _: True)
        upgrade(mesh, "node-2")
        for end in (sock, app):
            with pytest.raises(ConnectionResetError):
                end.recv(1)
    finally:
        settings.write_text(before)
        mesh.lab.node("node-2").restart("nodeagent")
    assert mesh.line("far", "inbound", port)["reason"] == "drain_timeout"
    forget_drains(mesh)
