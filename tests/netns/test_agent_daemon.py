"""The daemon as a process, with the kernel's own capture: start, crash, end, removal."""

from __future__ import annotations

import array
import contextlib
import itertools
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeagent.admin import Status
from nodeagent.admin.model import PodState
from nodeagent.cli.reach import UnreachableError
from nodeagent.cli.status import fetch
from support.netns import DEADLINE, Namespace, namespace, veth, wait_until

ROOT = Path(__file__).parents[2]
_numbers = itertools.count()

WORKLOAD = """
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata:
  name: a
  namespace: default
  annotations: {{nodeagent.io/netns: {netns}, nodeagent.io/addresses: "fd09::1"}}
spec: {{address: 10.9.0.1, serviceAccount: a}}
"""

LAUNCHER = """
import os, sys
fds = [int(text) for text in sys.argv[1].split(",") if text]
high = [os.dup2(fd, 500 + index) for index, fd in enumerate(fds)]
for index, fd in enumerate(high):
    os.dup2(fd, 3 + index)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.executable, [sys.executable, "-m", "nodeagent", *sys.argv[2:]])
"""


class ServiceManager:
    """What systemd does with NOTIFY_SOCKET: remembers messages, keeps descriptors."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.messages: list[str] = []
        self.store: dict[str, int] = {}

    def read(self) -> None:
        """Take what has come."""
        while True:
            try:
                data, ancillary, _, _ = self.socket.recvmsg(4096, 256, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            fields = dict(line.partition("=")[::2] for line in data.decode().splitlines())
            self.messages.append(data.decode())
            fds = array.array("i")
            for _, _, content in ancillary:
                fds.frombytes(content)
            if "FDSTORE" in fields:
                (self.store[fields["FDNAME"]],) = fds
            elif "FDSTOREREMOVE" in fields and fields["FDNAME"] in self.store:
                os.close(self.store.pop(fields["FDNAME"]))

    def said(self, message: str) -> bool:
        self.read()
        return message in self.messages

    def drop(self) -> None:
        """Empty the store, as systemd does when a unit is stopped for good."""
        while self.store:
            os.close(self.store.popitem()[1])

    def close(self) -> None:
        self.socket.close()
        self.drop()


class Node:
    """A node's namespace with a daemon in it, one pod, and a directory of its own."""

    def __init__(self, node: Namespace, pod: Namespace, directory: Path) -> None:
        self.node = node
        self.pod = pod
        self.directory = directory
        self.run_dir = directory / "run"
        self.bpf_dir = Path(f"/sys/fs/bpf/nat-{os.getpid():x}-daemon-{next(_numbers)}")
        self.settings = directory / "settings.yaml"
        self.mesh = directory / "mesh.d"
        self.mesh.mkdir()
        self.settings.write_text(
            f"node: node-1\nrun_dir: {self.run_dir}\nstate_dir: {directory}/state\n"
            f"config_dir: {self.mesh}\nbpf_dir: {self.bpf_dir}\n"
        )
        self.manager = ServiceManager(directory / "notify")
        self.processes: list[subprocess.Popen[bytes]] = []

    def bind(self) -> None:
        (self.mesh / "a.yaml").write_text(WORKLOAD.format(netns=self.pod.name))

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "nodeagent", *arguments, "--settings", str(self.settings)]
        return subprocess.run(
            ["nsenter", f"--net={self.node.path}", *argv],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            timeout=DEADLINE,
        )

    def start(self) -> subprocess.Popen[bytes]:
        """Start the daemon with what the manager keeps, and wait for READY=1."""
        self.manager.read()
        self.manager.messages.clear()
        kept = dict(self.manager.store)
        numbers = ",".join(map(str, kept.values()))
        arguments = ["run", "--settings", str(self.settings)]
        process = subprocess.Popen(
            [
                *("nsenter", f"--net={self.node.path}"),
                *(sys.executable, "-c", LAUNCHER, numbers, *arguments),
            ],
            env=os.environ
            | {
                "NOTIFY_SOCKET": str(self.directory / "notify"),
                "LISTEN_FDS": str(len(kept)),
                "LISTEN_FDNAMES": ":".join(kept),
            },
            pass_fds=tuple(kept.values()),
            cwd=ROOT,
        )
        self.processes.append(process)

        def ready() -> bool:
            assert process.poll() is None, "the daemon has ended"
            return self.manager.said("READY=1")

        wait_until(ready, "the daemon says that it is ready")
        return process

    def status(self) -> Status | None:
        with contextlib.suppress(UnreachableError):
            return fetch(self.run_dir)
        return None

    def enrolled(self) -> bool:
        status = self.status()
        return status is not None and [each.state for each in status.pods] == [PodState.ENROLLED]

    def listeners(self) -> set[str]:
        """The inodes of the pod's listening sockets."""
        return set(re.findall(r"ino:(\d+)", self.pod.check_output("ss", "-Htlne")))

    def end(self, process: subprocess.Popen[bytes], number: signal.Signals) -> int:
        process.send_signal(number)
        return process.wait(DEADLINE)

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        self.command("uninstall", "--yes")
        self.manager.close()
        shutil.rmtree(self.bpf_dir, ignore_errors=True)


@pytest.fixture
def node() -> Iterator[Node]:
    # Short: unix sockets lie below it.
    directory = Path("/run") / f"nat-{secrets.token_hex(4)}"
    directory.mkdir(0o700)
    try:
        with namespace("node") as made, namespace("pod") as pod:
            veth(pod, made, ["10.9.0.1/24", "fd09::1/64"], ["10.9.0.2/24", "fd09::2/64"])
            node = Node(made, pod, directory)
            try:
                yield node
            finally:
                node.close()
    finally:
        shutil.rmtree(directory)


def test_ready_means_captured_and_uninstall_leaves_nothing(node: Node) -> None:
    before = node.pod.dump()
    node.bind()
    process = node.start()
    wait_until(node.enrolled, "the pod is enrolled")
    status = node.status()
    assert status is not None
    assert status.missing == ("ztunnel is not connected",)
    assert len(node.listeners()) == 3
    asked = node.command("policy", "explain", "plaintext", "default/a:80")
    assert asked.returncode == 0, asked.stderr
    assert "config   in force on node-1" in asked.stdout
    assert "note: ztunnel is not connected" in asked.stderr
    limits = Path(f"/proc/{process.pid}/limits").read_text()
    assert re.search(r"Max core file size +0 +0 ", limits)
    assert node.end(process, signal.SIGTERM) == 0
    assert node.manager.said("STOPPING=1")
    node.manager.drop()
    captured = node.pod.dump()
    assert "lookup 100" in captured, "ending the daemon opens nothing"
    shown = node.command("uninstall")
    assert shown.returncode == 0
    assert "would remove default/a@" in shown.stdout
    assert node.pod.dump() == captured
    assert node.command("uninstall", "--yes").returncode == 0
    assert node.pod.dump() == before
    assert list(node.bpf_dir.iterdir()) == []


def test_a_killed_daemon_finds_its_sockets_in_the_store(node: Node) -> None:
    node.bind()
    process = node.start()
    wait_until(node.enrolled, "the pod is enrolled")
    sockets = node.listeners()
    node.manager.read()
    assert len(node.manager.store) == 4
    # Nobody serves the pod: the connection waits in the backlog.
    waiting = node.node.connect(("10.9.0.1", 15008))
    node.end(process, signal.SIGKILL)
    node.start()
    wait_until(node.enrolled, "the pod is enrolled again")
    assert node.listeners() == sockets
    waiting.send(b"still there")
    assert node.node.check_output("ss", "-Htn", "state", "established", "dport", "= :15008")


def test_a_second_daemon_and_an_uninstall_beside_one_are_refused(node: Node) -> None:
    node.bind()
    node.start()
    wait_until(node.enrolled, "the pod is enrolled")
    for command in ("run", "uninstall"):
        refused = node.command(command)
        assert refused.returncode == 1
        assert "another nodeagent is running" in refused.stderr
    assert node.enrolled()


def test_bindings_come_and_go_while_it_runs(node: Node) -> None:
    before = node.pod.dump()
    node.start()
    node.bind()
    wait_until(node.enrolled, "the pod is enrolled")
    (node.mesh / "b.yaml").write_text("kind: [")

    def refused() -> bool:
        status = node.status()
        return status is not None and len(status.config.problems) == 1

    wait_until(refused, "the bad document is refused")
    assert node.enrolled()
    shown = node.command("status")
    assert shown.returncode == 1
    assert "b.yaml" in shown.stdout
    (node.mesh / "a.yaml").unlink()

    def restored() -> bool:
        node.manager.read()
        return node.pod.dump() == before

    wait_until(restored, "the pod is as it was")
    assert node.manager.store == {}


def test_a_bad_start_says_why(node: Node) -> None:
    node.node.listen("127.0.0.1", 15000)
    refused = node.command("run")
    assert refused.returncode == 1
    assert "admin_address 127.0.0.1:15000" in refused.stderr
    node.settings.write_text("nonsense: true\n")
    refused = node.command("run")
    assert refused.returncode == 1
    assert f"{node.settings}:1" in refused.stderr


def test_the_watchdog_is_fed(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "3000000")
    node.start()
    node.manager.messages.clear()
    wait_until(lambda: node.manager.said("WATCHDOG=1"), "the watchdog is fed")
