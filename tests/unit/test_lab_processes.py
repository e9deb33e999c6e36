"""Processes by their start time, never by their number alone; and the record that names them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from nodeagent.lab import LabError, LabSpec, Node, NoSuchLabError
from nodeagent.lab import plan as planning
from nodeagent.lab.launch import EXIT_ABANDONED, launch_script
from nodeagent.lab.processes import ProcessRecord, end_all, record_of
from nodeagent.lab.store import State, Store


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "1000"])
    yield process
    process.kill()
    process.wait()


def recorded(pid: int) -> ProcessRecord:
    found = record_of(pid)
    assert found is not None
    return found


def test_a_recycled_number_is_another_process(sleeper: subprocess.Popen[bytes]) -> None:
    own = recorded(sleeper.pid)
    other = msgspec.structs.replace(own, start=own.start - 1)
    assert own.alive()
    assert not other.alive()
    assert not other.send(signal.SIGKILL)
    assert end_all([other]) == []
    assert sleeper.poll() is None


def test_ending_is_polite_first(tmp_path: Path) -> None:
    said = tmp_path / "said"
    program = f"trap 'echo bye > {said}; exit' TERM; echo up > {said}; while :; do sleep 0.01; done"
    process = subprocess.Popen(["sh", "-c", program])
    deadline = time.monotonic() + 15
    while not said.exists() and time.monotonic() < deadline:
        os.sched_yield()
    assert end_all([recorded(process.pid)]) == []
    process.wait()
    assert said.read_text() == "bye\n"


STUBBORN = """\
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(flush=True)
time.sleep(1000)
"""


def test_ending_is_forcible_in_the_end() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STUBBORN],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()
    assert end_all([recorded(process.pid)], grace=0.05) == []
    process.wait()
    process.stdout.close()


def test_an_ended_child_is_let_go(sleeper: subprocess.Popen[bytes]) -> None:
    own = recorded(sleeper.pid)
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    assert not own.alive()
    assert end_all([own]) == []
    own.reap()
    assert record_of(sleeper.pid) is None


def test_a_process_whose_starter_died_never_runs(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    proof = tmp_path / "ran"
    place = f'{{"net": "/proc/self/ns/net", "gate": {reading}}}'
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", launch_script(), place, "touch", str(proof)],
        pass_fds=[reading],
    )
    os.close(reading)
    os.close(writing)
    assert process.wait() == EXIT_ABANDONED
    assert not proof.exists()


def state() -> State:
    spec = LabSpec(name="x", nodes=(Node(name="one"),))
    return State(plan=planning.make(spec), created=0.0, daemons=False)


def test_a_record_is_private_and_read_back(tmp_path: Path) -> None:
    store = Store(tmp_path / "labs", "x")
    written = state()
    written.processes["one/ztunnel"] = ProcessRecord(7, 9)
    store.create(written)
    assert store.load() == written
    assert store.layout.state.stat().st_mode & 0o777 == 0o600
    assert store.layout.directory.stat().st_mode & 0o777 == 0o700
    assert Store.names(tmp_path / "labs") == ["x"]


def test_a_second_lab_of_a_name_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "labs", "x")
    store.create(state())
    with pytest.raises(LabError, match="nodeagent lab down x"):
        store.create(state())


def test_a_base_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    base = tmp_path / "labs"
    base.mkdir()
    base.chmod(0o755)
    with pytest.raises(LabError, match="chmod 0700"):
        Store(base, "x").create(state())


@pytest.mark.parametrize("name", ["", "..", "a/b", "A", "a" * 33])
def test_a_name_cannot_lead_elsewhere(tmp_path: Path, name: str) -> None:
    with pytest.raises(LabError):
        Store(tmp_path, name)


def test_what_does_not_exist_is_said(tmp_path: Path) -> None:
    store = Store(tmp_path / "labs", "x")
    assert Store.names(tmp_path / "labs") == []
    with pytest.raises(NoSuchLabError):
        store.load()
    with pytest.raises(NoSuchLabError), store.locked():
        pass


def test_what_a_builder_left_before_its_record_is_said(tmp_path: Path) -> None:
    store = Store(tmp_path / "labs", "x")
    store.layout.directory.mkdir(parents=True)
    with pytest.raises(LabError, match="nodeagent lab down x"):
        store.load()


def test_a_record_of_another_version_is_said(tmp_path: Path) -> None:
    store = Store(tmp_path / "labs", "x")
    store.create(state())
    store.layout.state.write_text('{"version": 99}')
    with pytest.raises(LabError, match="another version"):
        store.load()


def test_the_last_lab_takes_the_base_with_it(tmp_path: Path) -> None:
    first, second = Store(tmp_path / "labs", "x"), Store(tmp_path / "labs", "y")
    first.create(state())
    second.create(state())
    first.destroy()
    assert Store.names(tmp_path / "labs") == ["y"]
    second.destroy()
    assert not (tmp_path / "labs").exists()
