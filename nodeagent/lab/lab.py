"""A lab from the outside: what the commands, the tests and the benchmarks use.

This module owns the object `Lab` and its nodes. It promises that an object stands for the lab on
record, whichever process built it: every call reads the record, and every change is made under the
lab's lock. It may not build or remove by itself: that is `builder`'s.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from nodeagent.lab import builder, plan, processes
from nodeagent.lab.documents import replace_file, to_yaml
from nodeagent.lab.launch import Place
from nodeagent.lab.model import DEFAULT_BASE, LabSpec, Layout, NodePlan, Pod, PodPlan
from nodeagent.lab.names import find_pod
from nodeagent.lab.processes import ProcessRecord
from nodeagent.lab.store import LabError, State, Store

__all__ = ["Lab", "LabNode"]


def _silent(_: str) -> None:
    return


class Lab:
    """A lab that exists. As a context manager it removes the lab at the end."""

    def __init__(self, name: str, base: Path = DEFAULT_BASE) -> None:
        """Stand for a lab that is up. Raises NoSuchLabError."""
        self._store = Store(base, name)
        self._store.load()

    @classmethod
    def up(
        cls,
        spec: LabSpec,
        *,
        base: Path = DEFAULT_BASE,
        daemons: bool = True,
        progress: Callable[[str], None] = _silent,
    ) -> Self:
        """Build a lab and wait until it is ready; without `daemons` it has no mesh.

        Raises LabError (with the ends of the logs) after removing whatever was made.
        """
        if os.geteuid() != 0:
            raise LabError("a lab makes network namespaces: run this as root")
        store = Store(base, spec.name)
        state = State(plan=plan.make(spec), created=time.time(), daemons=daemons)
        try:
            store.create(state)
            with store.locked():
                builder.Builder(store, state, progress).build()
        except BaseException as error:
            if store.owned:
                builder.remove(store)
            if isinstance(error, OSError):
                raise LabError(f"lab {spec.name} cannot be built: {error}") from error
            raise
        return cls(spec.name, base)

    def down(self) -> bool:
        """Remove the lab and all that is in it. False when it was gone already."""
        return builder.remove(self._store)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.down()

    # --- what there is ---------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self._store.name

    @property
    def layout(self) -> Layout:
        return self._store.layout

    @property
    def state(self) -> State:
        """The record as it is now."""
        return self._store.load()

    @property
    def nodes(self) -> list[LabNode]:
        return [LabNode(self, node) for node in self.state.plan.nodes]

    def node(self, name: str) -> LabNode:
        """Return a node. Raises LabError."""
        for node in self.nodes:
            if node.name == name:
                return node
        known = ", ".join(node.name for node in self.nodes)
        raise LabError(f"no node is called {name}; the nodes of this lab: {known}")

    def pod(self, text: str, namespace: str = "") -> PodPlan:
        """Return the pod that `text` names (`names.find_pod`). Raises UnknownPodError."""
        return find_pod(self.state.plan, text, namespace)

    def addresses(self, pod: str) -> tuple[str, ...]:
        """Return a pod's addresses, as given or IPv4 first."""
        return self.pod(pod).addresses

    def virtual_addresses(self, service: str) -> tuple[str, ...]:
        """Return the virtual addresses of the service "namespace/name". Raises LabError."""
        for planned in self.state.plan.services:
            if planned.service.uid == service:
                return planned.addresses
        raise LabError(f"no service is called {service}")

    # --- programs in pods ------------------------------------------------------------------------

    def place(self, pod: str, *, namespace: str = "", capabilities: bool = True) -> Place:
        """Return where a pod's programs run."""
        found = self.pod(pod, namespace)
        return Place(
            net=str(self.layout.pod_space(found)),
            hosts=str(self.layout.hosts(found)),
            hostname=found.pod.name,
            capabilities=capabilities,
        )

    def popen(
        self,
        pod: str,
        argv: Iterable[str],
        *,
        capabilities: bool = True,
        **options: Any,  # noqa: ANN401 - subprocess's own
    ) -> subprocess.Popen[Any]:
        """Start a program in a pod; `options` are those of subprocess.Popen."""
        command = processes.launch_argv(self.place(pod, capabilities=capabilities), argv)
        options.setdefault("env", processes.environment())
        return subprocess.Popen(command, **options)

    def run(
        self,
        pod: str,
        argv: Iterable[str],
        *,
        capabilities: bool = True,
        **options: Any,  # noqa: ANN401 - subprocess's own
    ) -> subprocess.CompletedProcess[Any]:
        """Run a program in a pod; `options` are those of subprocess.run, by default with the output
        captured as text.
        """
        command = processes.launch_argv(self.place(pod, capabilities=capabilities), argv)
        options.setdefault("env", processes.environment())
        if not {"stdout", "stderr", "capture_output"} & options.keys():
            options["capture_output"] = True
        options.setdefault("text", True)
        return subprocess.run(command, check=options.pop("check", False), **options)

    def namespace(self, place: str) -> Path:
        """Return the path of a network namespace: "fabric", a node's name, or a pod's."""
        if place == "fabric":
            return self.layout.fabric
        if any(node.name == place for node in self.state.plan.nodes):
            return self.layout.node_space(place)
        return self.layout.pod_space(self.pod(place))

    # --- configuration ---------------------------------------------------------------------------

    def apply(self, documents: str | Iterable[Mapping[str, Any]], name: str = "applied") -> Path:
        """Put documents into the file `name` of the nodes' shared configuration, replacing it."""
        text = documents if isinstance(documents, str) else to_yaml(map(dict, documents))
        path = self.layout.config / f"{name}.yaml"
        replace_file(path, text)
        return path

    def withdraw(self, name: str = "applied") -> None:
        """Remove what `apply` put there."""
        (self.layout.config / f"{name}.yaml").unlink(missing_ok=True)

    def enrol(self, pod: str, *, enrolled: bool = True) -> None:
        """Take a pod of the mesh into the capture, or out of it, while everything runs."""
        with self._store.locked():
            state = self._store.load()
            found = find_pod(state.plan, pod)
            if not found.pod.mesh:
                raise LabError(f"{found.uid} is outside the mesh (mesh: false) by the lab's file")
            changed = msgspec.structs.replace(
                found, pod=msgspec.structs.replace(found.pod, enrolled=enrolled)
            )
            state.plan = state.plan.with_pod(changed)
            self._store.save(state)
            made = builder.Builder(self._store, state, _silent)
            made.write_hosts(changed)
            made.write_workload(changed)

    def add_pod(self, pod: Pod) -> None:
        """Make one pod more while everything runs. Raises LabError when there is one of its name.

        Its service account, names and programs are as in a lab file; it is not checked as one.
        """
        with self._store.locked():
            state = self._store.load()
            if any(one.uid == pod.uid for one in state.plan.pods):
                raise LabError(f"there is a pod {pod.uid} already")
            state.plan = plan.add(state.plan, pod)
            self._store.save(state)
            made = builder.Builder(self._store, state, _silent)
            made.add_pod(find_pod(state.plan, pod.uid))

    def remove_pod(self, pod: str) -> None:
        """Unmake a pod while everything runs: its programs, its namespace, and its workload."""
        with self._store.locked():
            state = self._store.load()
            found = find_pod(state.plan, pod)
            builder.Builder(self._store, state, _silent).remove_pod(found)
            state.plan = state.plan.without_pod(found.uid)
            self._store.save(state)

    # --- daemons ---------------------------------------------------------------------------------

    def restart(self, node: NodePlan, daemon: str, *, wait: bool = True) -> None:
        """Start a daemon of a node, after ending the one that runs."""
        with self._store.locked():
            state = self._store.load()
            self._end(state, f"{node.name}/{daemon}")
            made = builder.Builder(self._store, state, _silent)
            made.start_daemon(node, daemon)
            if wait:
                made.wait_daemon(node.name, daemon)

    def stop(self, process: str) -> None:
        """End a process politely, and forcibly if it would not end: "node-1/ztunnel", or
        "default/age/age" for a pod's program.
        """
        with self._store.locked():
            self._end(self._store.load(), process)

    def restart_app(self, pod: str, app: str) -> None:
        """Start a program of a pod again, after ending the one that runs, and wait for it."""
        with self._store.locked():
            state = self._store.load()
            found = find_pod(state.plan, pod)
            program = next(one for one in found.pod.apps if one.name == app)
            self._end(state, f"{found.uid}/{app}")
            made = builder.Builder(self._store, state, _silent)
            made.start_app(found, program)
            made.wait_app(found, program)

    def _end(self, state: State, process: str) -> None:
        record = self.process(process, state)
        if processes.end_all([record]):
            raise LabError(f"{process} (process {record.pid}) would not end")
        record.reap()

    def process(self, name: str, state: State | None = None) -> ProcessRecord:
        """Return the record of a process. Raises LabError."""
        known = (state or self.state).processes
        if name not in known:
            raise LabError(f"no process is called {name}; there are {', '.join(known) or 'none'}")
        return known[name]


class LabNode:
    """One node of a lab: its namespace, its daemons and what they say."""

    def __init__(self, lab: Lab, node: NodePlan) -> None:
        self._lab = lab
        self.plan = node
        self.name = node.name

    @property
    def space(self) -> Path:
        return self._lab.layout.node_space(self.name)

    def run(
        self,
        argv: Iterable[str],
        **options: Any,  # noqa: ANN401 - subprocess's own
    ) -> subprocess.CompletedProcess[Any]:
        """Run a program in the node's network namespace, as `Lab.run` does in a pod's."""
        command = processes.launch_argv(Place(str(self.space)), argv)
        options.setdefault("env", processes.environment())
        if not {"stdout", "stderr", "capture_output"} & options.keys():
            options["capture_output"] = True
        options.setdefault("text", True)
        return subprocess.run(command, check=options.pop("check", False), **options)

    def process(self, daemon: str) -> ProcessRecord:
        """Return the process of "nodeagent" or "ztunnel"; `alive()` says whether it runs."""
        return self._lab.process(f"{self.name}/{daemon}")

    def kill(self, daemon: str, number: signal.Signals = signal.SIGKILL) -> bool:
        """Send a signal to a daemon. False when it does not run; does not wait for its end."""
        return self.process(daemon).send(number)

    def stop(self, daemon: str) -> None:
        """End a daemon and wait for its end."""
        self._lab.stop(f"{self.name}/{daemon}")

    def restart(self, daemon: str, *, wait: bool = True) -> None:
        """Start a daemon again, after ending the one that runs."""
        self._lab.restart(self.plan, daemon, wait=wait)

    def logs(self, daemon: str) -> str:
        """Return what a daemon has printed."""
        return _text(self._lab.layout.log(f"{self.name}/{daemon}"))

    def access_log(self) -> list[dict[str, Any]]:
        """Return the access log of the node's tunnel, oldest first; one entry a connection."""
        text = _text(self._lab.layout.access_log(self.name))
        # The last line may still be in the writing.
        whole = text[: text.rfind("\n") + 1]
        return [json.loads(line) for line in whole.splitlines()]

    def get(self, path: str, port: int) -> tuple[int, bytes]:
        """GET from one of the daemons' loopback ports. Raises OSError, HTTPException."""
        return builder.get(self.space, "127.0.0.1", port, path)

    def metrics(self, daemon: str = "ztunnel") -> str:
        """Return a daemon's metrics as text. Raises OSError, HTTPException."""
        port = {"ztunnel": 15020, "nodeagent": 15000}[daemon]
        return self.get("/metrics", port)[1].decode()


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return ""
