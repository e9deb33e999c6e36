"""A lab's life without daemons: programs, names, exec, and removal whatever happened."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from nodeagent.lab import App, Lab, LabError, LabSpec, Node, Pod, load_exercise, namespaces
from nodeagent.lab.builder import remove
from nodeagent.lab.processes import environment, members
from nodeagent.lab.store import Store
from support.netns import wait_until

CLI = [sys.executable, "-c", "from nodeagent.cli import cli; cli(prog_name='nodeagent')", "lab"]


@pytest.fixture
def base() -> Iterator[Path]:
    # Short: unix sockets lie below it. Not in tmp_path, whose length nobody knows.
    path = Path("/run") / f"lab-test-{secrets.token_hex(4)}"
    yield path
    for name in Store.names(path):
        remove(Store(path, name))
    assert not path.exists()


def cli(base: Path, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CLI, "--base", str(base), *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
        timeout=60,
    )


def mounts_below(directory: Path) -> list[str]:
    table = Path("/proc/self/mountinfo").read_text()
    return [line for line in table.splitlines() if f" {directory}/" in line]


def spaces(base: Path) -> set[tuple[int, int]]:
    return {namespaces.inode(path) for path in namespaces.mounted(base)}


def small(**changes: object) -> LabSpec:
    server = App(name="http", command=("python", "-m", "nodeagent.lab.apps.httpbin"), ready=8000)
    spec = LabSpec(
        name="small",
        nodes=(Node(name="one"),),
        pods=(Pod(name="client", node="one"), Pod(name="server", node="one", apps=(server,))),
    )
    return msgspec.structs.replace(spec, **changes)


@pytest.mark.parametrize(
    "exercise,pod,url,words",
    [
        ("sentences", "client", "sentences:5000", ["years."]),
        ("sentences", "client", "sentences.default.svc.cluster.local:5000", ["years."]),
        ("istioinaction", "default/sleep", "httpbin.default:8000/headers", ["Host"]),
        (
            "istioinaction",
            "istioinaction/sleep",
            "web-api:8080",
            ["web-api", "recommendation", "purchase-history"],
        ),
    ],
)
@pytest.mark.parametrize("family", ["-4", "-6"])
def test_the_exercises_work(
    base: Path, exercise: str, pod: str, url: str, words: list[str], family: str
) -> None:
    with Lab.up(load_exercise(exercise), base=base, daemons=False) as lab:
        done = lab.run(pod, ["curl", "-sS", "--fail", "--max-time", "10", family, url])
        assert done.returncode == 0, done.stderr
        assert all(word in done.stdout for word in words)


def test_exec_is_the_program_itself(base: Path) -> None:
    with Lab.up(small(), base=base, daemons=False):
        assert cli(base, "exec", "client", "--", "sh", "-c", "exit 7").returncode == 7
        assert cli(base, "exec", "client", "--", "cat", stdin="through\n").stdout == "through\n"
        assert cli(base, "exec", "client", "--", "hostname").stdout == "client\n"
        assert cli(base, "exec", "client", "--", "no-such-program").returncode == 127
        assert cli(base, "exec", "client", "--", "/etc").returncode == 126
        program = subprocess.Popen(
            [*CLI, "--base", str(base), "exec", "client", "--", "sh", "-c", "echo $$; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
        )
        with program:
            assert program.stdout is not None
            assert int(program.stdout.readline()) == program.pid
            program.send_signal(signal.SIGUSR1)
            assert program.wait(30) == -signal.SIGUSR1


RAW_SOCKET = "import socket; socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)"


def test_a_pods_program_has_its_names_and_no_capabilities(base: Path) -> None:
    with Lab.up(small(), base=base, daemons=False) as lab:
        done = lab.run("client", ["grep", "Cap", "/proc/self/status"], capabilities=False)
        bits = {
            line.split(":\t")[0]: int(line.split(":\t")[1], 16) for line in done.stdout.splitlines()
        }
        assert bits["CapEff"] == bits["CapPrm"] == bits["CapBnd"] == 1 << 2
        raw = lab.run("client", [sys.executable, "-c", RAW_SOCKET], capabilities=False)
        assert "PermissionError" in raw.stderr
        program = lab.process("default/server/http")
        shown = Path(f"/proc/{program.pid}/status").read_text()
        assert f"CapEff:\t{1 << 2:016x}\n" in shown
        hosts = lab.run("client", ["cat", "/etc/hosts"]).stdout
        assert f"{lab.addresses('client')[0]} client\n" in hosts
        assert hosts != Path("/etc/hosts").read_text()


def test_a_pod_sees_no_namespace_and_no_pins_of_any_lab(base: Path) -> None:
    with Lab.up(small(), base=base, daemons=False) as lab:
        table = lab.run("client", ["cat", "/proc/self/mountinfo"]).stdout
        assert " - nsfs " not in table
        assert " - bpf " not in table


def test_nothing_stays(base: Path) -> None:
    lab = Lab.up(load_exercise("sentences"), base=base, daemons=False)
    stray = lab.popen("client", ["sleep", "1000"])
    wait_until(
        lambda: Path(f"/proc/{stray.pid}/comm").read_text() == "sleep\n", "sleep runs in the pod"
    )
    living = spaces(base)
    started = list(lab.state.processes.values())
    assert len(living) == 1 + 2 + 5
    assert len(members(living)) == 4 + 1
    assert lab.down()
    assert stray.wait(10) == -signal.SIGTERM
    assert not lab.down()
    assert members(living) == []
    assert not any(one.alive() for one in started)
    assert mounts_below(base) == []
    assert not base.exists()


def test_a_base_by_another_name_is_the_same_base(base: Path, tmp_path: Path) -> None:
    base.mkdir(mode=0o700)
    alias = tmp_path / "alias"
    alias.symlink_to(base)
    Lab.up(small(), base=alias, daemons=False)
    assert remove(Store(alias, "small"))
    assert mounts_below(base) == []
    assert not base.exists()


def test_labs_live_side_by_side(base: Path) -> None:
    names = ("first", "second")
    labs = [Lab.up(small(name=name), base=base, daemons=False) for name in names]
    assert labs[0].addresses("server") == labs[1].addresses("server")
    address = labs[0].addresses("server")[0]
    gone = labs[0].down()
    assert gone
    assert labs[1].run("client", ["curl", "-sS", f"{address}:8000/ip"]).returncode == 0
    listed = json.loads(cli(base, "status", "-o", "json").stdout)["labs"]
    assert [each["name"] for each in listed] == ["second"]
    assert cli(base, "down", "--all").returncode == 0
    assert not base.exists()


def test_a_name_is_taken_once(base: Path) -> None:
    with Lab.up(small(), base=base, daemons=False):
        with pytest.raises(LabError, match="down small"):
            Lab.up(small(), base=base, daemons=False)
        assert Lab("small", base).run("client", ["true"]).returncode == 0


def test_a_build_that_fails_shows_why_and_leaves_nothing(base: Path) -> None:
    program = App(name="x", command=("sh", "-c", "echo the reason; exit 3"), ready=80)
    pods = (Pod(name="bad", node="one", apps=(program,)),)
    with pytest.raises(LabError, match="the reason"):
        Lab.up(small(pods=pods), base=base, daemons=False)
    assert mounts_below(base) == []
    assert not base.exists()


def test_an_ended_program_is_a_finding(base: Path) -> None:
    with Lab.up(small(), base=base, daemons=False) as lab:
        assert cli(base, "status").returncode == 0
        lab.stop("default/server/http")
        result = cli(base, "status")
        assert result.returncode == 1
        assert "http ended" in result.stdout
        lab.restart_app("server", "http")
        assert cli(base, "status").returncode == 0


def test_programs_that_were_killed_with_their_starter_are_not_needed_to_remove(base: Path) -> None:
    lab = Lab.up(small(), base=base, daemons=False)
    assert lab.process("default/server/http").send(signal.SIGKILL)
    lab.layout.state.unlink()
    living = spaces(base)
    assert remove(Store(base, "small"))
    assert members(living) == []
    assert not base.exists()


def test_pods_come_and_go_while_the_others_stay(base: Path) -> None:
    with Lab.up(small(), base=base, daemons=False) as lab:
        server = lab.pod("server")
        url = f"{server.addresses[0]}:8000/ip"
        for _ in range(2):
            lab.remove_pod("server")
            assert len(spaces(base)) == 1 + 1 + 1
            assert lab.run("client", ["curl", "-sS", "--max-time", "1", url]).returncode != 0
            lab.add_pod(server.pod)
            assert lab.addresses("server") == server.addresses
            assert lab.run("client", ["curl", "-sS", url]).returncode == 0
        with pytest.raises(LabError, match="already"):
            lab.add_pod(server.pod)


MOMENTS = ["directory", "record", "space 1", "space 4", "space 8", "process 1", "process 3"]


def reached(base: Path, moment: str) -> bool:
    kind, _, number = moment.partition(" ")
    store = Store(base, "sentences")
    if kind == "directory":
        return store.layout.directory.exists()
    if kind == "record":
        return store.layout.state.exists()
    if kind == "space":
        return len(mounts_below(base)) >= int(number)
    return store.layout.state.exists() and len(store.load().processes) >= int(number)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_up_may_die_at_any_moment(base: Path, moment: str, number: signal.Signals) -> None:
    program = subprocess.Popen(
        [*CLI, "--base", str(base), "up", "--no-daemons", "sentences"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
    )
    with program:
        wait_until(lambda: reached(base, moment) or program.poll() is not None, moment)
        os.kill(program.pid, number) if program.poll() is None else None
        program.wait(30)
    living = spaces(base)
    if number != signal.SIGKILL and program.returncode != 0:
        # Interrupted: it has removed everything itself.
        assert not base.exists()
    assert cli(base, "down").returncode == 0
    assert members(living) == []
    assert mounts_below(base) == []
    assert not base.exists()
