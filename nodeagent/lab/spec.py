"""From a lab file to a checked description.

This module owns reading lab files. It promises that what it returns can be built: every name is
unique, every reference leads somewhere, every address lies where it is used; and that everything
wrong is reported with file, line, column and field, all of it at once. It reads the file, those
that it names and the exercises of this package, and touches nothing else.
"""

from __future__ import annotations

import importlib.resources
import ipaddress
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from nodeagent import api
from nodeagent.api import ConfigError
from nodeagent.api._scalars import is_null, read_boolean, read_integer
from nodeagent.api._tree import Mapping, Node, Scalar, Sequence, join, read_tree
from nodeagent.api._walk import Walker
from nodeagent.lab.documents import to_yaml
from nodeagent.lab.model import LabSpec, Pod
from nodeagent.lab.plan import FABRIC, max_nodes, max_pods, networks

__all__ = ["exercises", "load", "load_bytes", "load_exercise", "parse_documents"]


def exercises() -> list[str]:
    """Return the names of the exercises that come with this package."""
    folder = importlib.resources.files("nodeagent.lab") / "exercises"
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    )


def load_exercise(name: str) -> LabSpec:
    """Return one of `exercises()`."""
    path = importlib.resources.files("nodeagent.lab") / "exercises" / f"{name}.yaml"
    return load_bytes(path.read_bytes(), f"{name}.yaml", None)


def load(path: Path) -> LabSpec:
    """Return what the file says. Raises ConfigError, OSError."""
    return load_bytes(path.read_bytes(), str(path), path.parent)


def load_bytes(data: bytes, file: str, directory: Path | None) -> LabSpec:
    """Return what `data` says; `file` names it in errors, `directory` holds the files it names."""
    roots, errors = read_tree(data, file)
    walker = Walker(file)
    walker.errors += errors
    spec: LabSpec | None = None
    if len(roots) != 1 and not errors:
        raise ConfigError(file, 0, 0, "", f"holds {len(roots)} documents: a lab file is one")
    if roots and not errors:
        root = roots[0]
        spec = walker.read(root, LabSpec, "")
        if spec is not None and isinstance(root, Mapping):
            spec = _complete(spec, root, walker, directory)
            _Checker(walker, root, spec).check()
    _raise(walker.errors)
    if spec is None:
        raise ConfigError(file, 0, 0, "", "is empty: describe at least a name and one node")
    return spec


def parse_documents(data: bytes, file: str) -> list[dict[str, Any]]:
    """Return the YAML documents in `data` as plain values. Raises ConfigError."""
    roots, errors = read_tree(data, file)
    _raise(errors)
    return [_plain(root) for root in roots if isinstance(root, Mapping)]


def _raise(errors: list[ConfigError]) -> None:
    if errors:
        first, *rest = errors
        raise ConfigError(
            first.file, first.line, first.column, first.field, first.reason, tuple(rest)
        )


def _plain(node: Node) -> Any:  # noqa: ANN401 - any value of YAML
    """Return a tree as plain values, as readers of YAML would take them."""
    if isinstance(node, Mapping):
        return {key: _plain(child) for key, (_, child) in node.entries.items()}
    if isinstance(node, Sequence):
        return [_plain(item) for item in node.items]
    if not isinstance(node, Scalar):
        return None
    if is_null(node):
        return None
    for reader in (read_boolean, read_integer):
        try:
            return reader(node)
        except ValueError:
            continue
    return node.text


def _complete(spec: LabSpec, root: Mapping, walker: Walker, directory: Path | None) -> LabSpec:
    """Add what the walker leaves alone: further settings, resources, and the files named."""
    resources: list[dict[str, Any]] = []
    listed = root.get("resources")
    if isinstance(listed, Sequence):
        for index, item in enumerate(listed.items):
            resources.append(_resource(walker, item, ("resources", index)))
    elif listed is not None:
        walker.error(listed, "resources", "must be a list of Istio resources")
    resources += _attached(spec, root, walker, directory)
    nodes = list(spec.nodes)
    for index, node in enumerate(nodes):
        place = locate(root, "nodes", index)
        extra = place.get("settings") if isinstance(place, Mapping) else None
        if isinstance(extra, Mapping):
            nodes[index] = msgspec.structs.replace(node, settings=_plain(extra))
        elif extra is not None:
            walker.error(extra, f"nodes[{index}].settings", "must be a mapping")
    return msgspec.structs.replace(spec, nodes=tuple(nodes), resources=tuple(resources), files=())


def _resource(walker: Walker, item: Node, keys: tuple[str | int, ...]) -> dict[str, Any]:
    """Return a resource as plain values, once the mesh's own reader has nothing against it."""
    path = _path(keys)
    if not isinstance(item, Mapping):
        walker.error(item, path, "must be a resource: a mapping")
        return {}
    value: dict[str, Any] = _plain(item)
    for error in api.load(to_yaml([value]).encode(), walker.file).errors:
        # Its lines are those of the text that was made here; its field leads to the author's.
        place = locate(item, *_keys(error.field))
        walker.error(place, f"{path}.{error.field}" if error.field else path, error.reason)
    return value


def _keys(field: str) -> list[str | int]:
    """Return the keys of a path such as "spec.ports[0].name"."""
    parts = re.findall(r"[A-Za-z_][A-Za-z0-9_-]*|\[\d+\]|\['[^']*'\]", field)
    return [int(p[1:-1]) if p[1:-1].isdecimal() else p.strip("[]'") for p in parts]


def _path(keys: Iterable[str | int]) -> str:
    path = ""
    for key in keys:
        path = join(path, key)
    return path


def _attached(
    spec: LabSpec, root: Mapping, walker: Walker, directory: Path | None
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for index, name in enumerate(spec.files):
        path = (directory or Path()) / name
        try:
            data = path.read_bytes()
        except OSError as error:
            place = locate(root, "files", index)
            walker.error(place, f"files[{index}]", f"{path} cannot be read: {error.strerror}")
            continue
        errors = api.load(data, str(path)).errors
        walker.errors += errors
        if not errors:
            found += parse_documents(data, str(path))
    return found


def locate(root: Node, *keys: str | int) -> Node:
    """Return the node at a path, or the nearest above it."""
    node = root
    for key in keys:
        below: Node | None = None
        if isinstance(node, Mapping) and isinstance(key, str):
            below = node.get(key)
        elif isinstance(node, Sequence) and isinstance(key, int) and key < len(node.items):
            below = node.items[key]
        if below is None:
            return node
        node = below
    return node


class _Checker:
    """What no single value shows: uniqueness and references."""

    def __init__(self, walker: Walker, root: Mapping, spec: LabSpec) -> None:
        self._walker = walker
        self._root = root
        self._spec = spec

    def _error(self, reason: str, *keys: str | int) -> None:
        self._walker.error(locate(self._root, *keys), _path(keys), reason)

    def check(self) -> None:
        spec = self._spec
        self._unique("nodes", [node.name for node in spec.nodes], "name")
        self._unique("pods", [pod.uid for pod in spec.pods], "name")
        self._unique("services", [service.uid for service in spec.services], "name")
        if len(spec.nodes) > (most := max_nodes(spec)):
            self._error(f"more than {most} nodes", "nodes")
        known: dict[str, int] = {}
        for index, node in enumerate(spec.nodes, 1):
            known.setdefault(node.name, index)
        seen: dict[str, str] = {}
        for index, pod in enumerate(spec.pods):
            self._pod(index, pod, known, seen)
        for name in known:
            if sum(pod.node == name for pod in spec.pods) > (most := max_pods(spec)):
                hint = "" if spec.large else "; with `large: true` there may be more"
                self._error(f"more than {most} pods on node {name}{hint}", "pods")
        self._services()

    def _unique(self, kind: str, names: list[str], field: str) -> None:
        first: dict[str, int] = {}
        for index, name in enumerate(names):
            if name in first:
                reason = f"{name} is given twice, first as {kind}[{first[name]}]: rename one"
                self._error(reason, kind, index, field)
            first.setdefault(name, index)

    def _pod(self, index: int, pod: Pod, known: dict[str, int], seen: dict[str, str]) -> None:
        if pod.node not in known:
            reason = f"no node is called {pod.node}; there are {', '.join(known)}"
            self._error(reason, "pods", index, "node")
            return
        self._unique_apps(index, pod)
        place = locate(self._root, "pods", index, "enrolled")
        if not pod.mesh and isinstance(place, Scalar) and place.text == "true":
            reason = (
                "a pod outside the mesh (mesh: false) cannot be enrolled: delete one of the two"
            )
            self._error(reason, "pods", index, "enrolled")
        families: set[int] = set()
        for number, text in enumerate(pod.addresses):
            address = ipaddress.ip_address(text)
            below = ("pods", index, "addresses", number)
            if address.version in families:
                self._error(f"a second IPv{address.version} address: give one", *below)
            families.add(address.version)
            home = next(
                network
                for each in networks(known[pod.node], large=self._spec.large)
                if (network := ipaddress.ip_network(each)).version == address.version
            )
            if address not in home or address in (home[0], home[1], home[-1]):
                reason = (
                    f"{text} is no pod's address on {pod.node}: take one of {home}, from {home[2]}"
                )
                self._error(reason, *below)
            if text in seen:
                self._error(f"{text} belongs to {seen[text]} already", *below)
            seen.setdefault(text, pod.uid)

    def _unique_apps(self, index: int, pod: Pod) -> None:
        names = [app.name for app in pod.apps]
        for number, name in enumerate(names):
            if name in names[:number]:
                self._error(f"{name} is given twice: rename one", "pods", index, "apps", number)

    def _services(self) -> None:
        seen: dict[str, str] = {}
        known = range(1, len(self._spec.nodes) + 1)
        for index, service in enumerate(self._spec.services):
            ports = [port.port for port in service.ports]
            if len(set(ports)) != len(ports):
                self._error("a port is given twice: remove one", "services", index, "ports")
            if not any(service.selects(pod) for pod in self._spec.pods):
                reason = f"selects no pod of namespace {service.namespace}: give a pod these labels"
                self._error(reason, "services", index, "selector")
            for number, text in enumerate(service.addresses):
                below = ("services", index, "addresses", number)
                if text in seen:
                    self._error(f"{text} belongs to {seen[text]} already", *below)
                seen.setdefault(text, service.uid)
                pods = (networks(number, large=self._spec.large) for number in known)
                taken = [*FABRIC, *(one for each in pods for one in each)]
                for network in map(ipaddress.ip_network, taken):
                    if ipaddress.ip_address(text) in network:
                        reason = f"{text} lies in {network}, where nodes and pods are: take another"
                        self._error(reason, *below)
