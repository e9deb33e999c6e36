"""Makes a lab and removes it.

This module owns the order of building and of removing. It promises that a lab is on record before
anything of it exists, that a build which fails or is interrupted removes what it made, and that
removal works on whatever a build that was killed has left, as often as it is asked. It may not know
commands or output.

Removing, in this order:
1. The recorded processes, politely and then by force: the daemons write their last log lines.
2. Whatever else still lives in the lab's namespaces (`exec`, and what the applications started).
3. The mounts below the lab's directory: the BPF file system with every pin in it, and the
   namespaces with every link, rule, route and listening socket in them.
4. The directory, with the record as its last meaning.
"""

from __future__ import annotations

import contextlib
import http.client
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from nodeagent.lab import namespaces, plan, processes
from nodeagent.lab.documents import replace_file, to_yaml
from nodeagent.lab.launch import Place
from nodeagent.lab.model import App, LabPlan, Layout, NodePlan, PodPlan
from nodeagent.lab.processes import ProcessRecord
from nodeagent.lab.store import LabError, NoSuchLabError, State, Store
from nodeagent.lab.topology import Topology

__all__ = ["DAEMONS", "Builder", "get", "remove"]

DAEMONS: Final = ("nodeagent", "ztunnel")

READY_SECONDS: Final = 30.0
"""Making a CA and the SVIDs of a node takes a second or two on a loaded machine."""
READY_STEP_SECONDS: Final = 0.05
HTTP_SECONDS: Final = 2.0
SWEEPS: Final = 20
"""Rounds of ending what lives in the namespaces: a fork that is faster than twenty is an attack."""
TCP_LISTEN: Final = "0A"
"""A listening socket's state in /proc/net/tcp (include/net/tcp_states.h)."""
LOG_TAIL_LINES: Final = 15

READY_ADDRESSES: Final = {"nodeagent": ("127.0.0.1", 15000), "ztunnel": ("127.0.0.1", 15021)}
READY_PATH: Final = "/healthz/ready"


def get(space: Path, host: str, port: int, path: str) -> tuple[int, bytes]:
    """GET inside a namespace. Raises OSError, HTTPException."""

    def work() -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(host, port, timeout=HTTP_SECONDS)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    return namespaces.run_in(space, work)


def tail(log: Path) -> str:
    """Return the last lines of a log, indented, or a word about why there are none."""
    try:
        lines = log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
    except FileNotFoundError:
        return "    (no output)"
    return "\n".join(f"    {line}" for line in lines) or "    (no output)"


class Builder:
    """Builds one lab and starts its processes; also starts single ones again later."""

    def __init__(self, store: Store, state: State, progress: Callable[[str], None]) -> None:
        self._store = store
        self._state = state
        self._progress = progress

    @property
    def _plan(self) -> LabPlan:
        return self._state.plan

    @property
    def _layout(self) -> Layout:
        return self._store.layout

    def build(self) -> None:
        """Make everything; the caller removes it when this raises."""
        made = self._plan
        self._progress(f"network: {len(made.nodes)} nodes, {len(made.pods)} pods")
        Topology(made, self._layout).build()
        self._write_files()
        if self._state.daemons:
            namespaces.mount_bpf(self._layout.bpf)
            self._progress("daemons: " + ", ".join(node.name for node in made.nodes))
            for node in made.nodes:
                for daemon in DAEMONS:
                    self.start_daemon(node, daemon)
            for node in made.nodes:
                for daemon in DAEMONS:
                    self.wait_daemon(node.name, daemon)
        self._start_apps()
        self._state.complete = True
        self._store.save(self._state)

    def _write_files(self) -> None:
        layout, made = self._layout, self._plan
        for directory in (layout.config, layout.ca, layout.logs, layout.directory / "hosts"):
            directory.mkdir(mode=0o700)
        for name, documents in plan.mesh_documents(made, layout).items():
            replace_file(layout.config / name, to_yaml(documents))
        for pod in made.pods:
            self.write_hosts(pod)
        for node in made.nodes:
            layout.run(node.name).mkdir(mode=0o700, parents=True)
            (layout.node_directory(node.name) / "state").mkdir(mode=0o700)
            values = plan.settings(made, node, layout)
            replace_file(layout.settings(node.name), to_yaml([values]))

    def write_hosts(self, pod: PodPlan) -> None:
        """Write a pod's /etc/hosts in place: running programs have this very file mounted."""
        captured = pod.pod.captured and self._state.daemons
        text = plan.hosts(self._plan, pod, captured=captured)
        self._layout.hosts(pod).write_text(text)

    def add_pod(self, pod: PodPlan) -> None:
        """Make one pod of the plan, which the record holds already, and start its programs."""
        Topology(self._plan, self._layout).add_pod(pod)
        self.write_hosts(pod)
        if pod.pod.mesh:
            self.write_workload(pod)
        for app in pod.pod.apps:
            self.start_app(pod, app)
        for app in pod.pod.apps:
            self.wait_app(pod, app)

    def remove_pod(self, pod: PodPlan) -> None:
        """Unmake one pod, first of all its programs."""
        for app in pod.pod.apps:
            record = self._state.processes.pop(f"{pod.uid}/{app.name}", None)
            if record is not None:
                processes.end_all([record])
                record.reap()
        space = self._layout.pod_space(pod)
        processes.end_all(processes.members({namespaces.inode(space)}))
        self.workload_file(pod).unlink(missing_ok=True)
        Topology(self._plan, self._layout).remove_pod(pod)
        self._layout.hosts(pod).unlink()

    def workload_file(self, pod: PodPlan) -> Path:
        return self._layout.config / f"workload.{pod.key}.yaml"

    def write_workload(self, pod: PodPlan) -> None:
        """Write what the mesh is told of a pod."""
        document = plan.workload(self._plan, pod, self._layout)
        replace_file(self.workload_file(pod), to_yaml([document]))

    def _record(self, name: str, record: ProcessRecord) -> None:
        self._state.processes[name] = record
        self._store.save(self._state)

    def _start(self, name: str, place: Place, argv: list[str]) -> None:
        log = self._layout.log(name)
        processes.start(place, argv, log, partial(self._record, name))

    def start_daemon(self, node: NodePlan, daemon: str) -> None:
        """Start one daemon of a node in the node's network namespace."""
        layout = self._layout
        if daemon == "nodeagent":
            arguments = ["run", "--settings", str(layout.settings(node.name))]
        else:
            arguments = [
                *("--control", str(layout.run(node.name) / "ztunnel.sock")),
                *("--ready-address", "127.0.0.1:15021", "--stats-address", "127.0.0.1:15020"),
                *("--access-log", str(layout.access_log(node.name)), "--log-format", "json"),
                *node.node.ztunnel_arguments,
            ]
        place = Place(str(layout.node_space(node.name)))
        self._start(f"{node.name}/{daemon}", place, [sys.executable, "-m", daemon, *arguments])

    def wait_daemon(self, node: str, daemon: str) -> None:
        """Wait until a daemon answers that it is ready. Raises LabError with its log's end."""
        host, port = READY_ADDRESSES[daemon]

        def probe() -> str:
            try:
                status, body = get(self._layout.node_space(node), host, port, READY_PATH)
            except (OSError, http.client.HTTPException) as error:
                return f"no answer on {host}:{port}: {error}"
            return "" if status == http.client.OK else body.decode(errors="replace").strip()

        self._wait(f"{node}/{daemon}", probe)

    def _wait(self, name: str, probe: Callable[[], str]) -> None:
        """Ask until `probe` has no objection left. Raises LabError at the deadline, or at once when
        the process has ended.
        """
        deadline = time.monotonic() + READY_SECONDS
        while objection := probe():
            ended = not self._state.processes[name].alive()
            if ended or time.monotonic() > deadline:
                late = f"was not ready in {READY_SECONDS:.0f} s ({objection})"
                what = "ended" if ended else late
                log = self._layout.log(name)
                raise LabError(f"{name} {what}; the end of {log}:\n{tail(log)}")
            time.sleep(READY_STEP_SECONDS)

    def _start_apps(self) -> None:
        waiting: list[tuple[PodPlan, App]] = []
        for pod in self._plan.pods:
            for app in pod.pod.apps:
                self.start_app(pod, app)
                waiting.append((pod, app))
        if waiting:
            self._progress("applications: " + ", ".join(pod.uid for pod, _ in waiting))
        for pod, app in waiting:
            self.wait_app(pod, app)

    def place(self, pod: PodPlan, *, capabilities: bool) -> Place:
        return Place(
            net=str(self._layout.pod_space(pod)),
            hosts=str(self._layout.hosts(pod)),
            hostname=pod.pod.name,
            capabilities=capabilities,
        )

    def start_app(self, pod: PodPlan, app: App) -> None:
        """Start a program of a pod, without capabilities."""
        program, *arguments = app.command
        argv = [sys.executable if program == "python" else program, *arguments]
        if app.environment:
            argv = ["env", *(f"{key}={value}" for key, value in app.environment.items()), *argv]
        self._start(f"{pod.uid}/{app.name}", self.place(pod, capabilities=False), argv)

    def wait_app(self, pod: PodPlan, app: App) -> None:
        """Wait until a program listens on its port. Raises LabError with its log's end."""
        if not app.ready:
            return
        space = self._layout.pod_space(pod)

        def probe() -> str:
            up = namespaces.run_in(space, partial(_listens, app.ready))
            return "" if up else f"nothing listens on port {app.ready}"

        self._wait(f"{pod.uid}/{app.name}", probe)


def _listens(port: int) -> bool:
    """True when something in this thread's namespace listens on a port, of either family."""
    for family in ("tcp", "tcp6"):
        with Path(f"/proc/thread-self/net/{family}").open() as table:
            next(table)
            for line in table:
                _, local, _, state, *_ = line.split()
                if state == TCP_LISTEN and int(local.rpartition(":")[2], 16) == port:
                    return True
    return False


def remove(store: Store) -> bool:
    """Remove a lab, whatever is left of it. False when there was nothing. Raises LabError."""
    try:
        with store.locked():
            _remove(store)
    except NoSuchLabError:
        return False
    return True


def _remove(store: Store) -> None:
    layout = store.layout
    recorded: list[ProcessRecord] = []
    # Without a (readable) record nothing was started under it: the namespaces still tell the rest.
    with contextlib.suppress(LabError):
        recorded = list(store.load().processes.values())
    stuck = processes.end_all(recorded)
    for one in recorded:
        one.reap()
    living: set[tuple[int, int]] = set()
    if layout.spaces.is_dir():
        living = {namespaces.inode(path) for path in namespaces.mounted(layout.spaces)}
    for _ in range(SWEEPS):
        found = processes.members(living)
        if not found:
            break
        stuck = processes.end_all(found)
    if stuck:
        numbers = ", ".join(str(one.pid) for one in stuck)
        raise LabError(
            f"lab {store.name}: processes {numbers} would not end, even by SIGKILL; "
            f"they are stuck in the kernel. Try again: nodeagent lab down {store.name}"
        )
    namespaces.unmount_below(layout.directory)
    store.destroy()
