"""What a lab file says, as values.

This module owns the types of a lab's description and of the plan made from it. It promises plain,
immutable data that survives JSON unchanged. It holds no behaviour beyond looking things up and
touches nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final

import msgspec

from nodeagent.lab.checks import (
    ADDRESS,
    ALGORITHM,
    IGNORED,
    LAB_NAME,
    LABEL,
    MTU,
    NOT_EMPTY,
    PORT,
    TRUST_DOMAIN,
)

__all__ = [
    "DEFAULT_BASE",
    "App",
    "LabPlan",
    "LabSpec",
    "Layout",
    "Node",
    "NodePlan",
    "Pod",
    "PodPlan",
    "Port",
    "Service",
    "ServicePlan",
]

DEFAULT_BASE: Final = Path("/run/nodeagent-lab")


class _Base(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, rename="camel"):
    pass


class App(_Base, frozen=True, kw_only=True):
    """A program of a pod. A command that starts with "python" gets this very interpreter.

    `ready` is the port that it listens on once it is up, 0 when there is nothing to wait for.
    """

    name: Annotated[str, LABEL]
    command: Annotated[tuple[str, ...], NOT_EMPTY]
    ready: Annotated[int, PORT] = 0
    environment: dict[str, str] = {}


class Pod(_Base, frozen=True, kw_only=True):
    """`mesh` is false for a pod that the mesh does not know; `enrolled` says whether its traffic is
    captured; `addresses` are at most one of each family, empty to have both assigned.
    """

    name: Annotated[str, LABEL]
    namespace: Annotated[str, LABEL] = "default"
    node: Annotated[str, LABEL]
    service_account: Annotated[str, LABEL] = "default"
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    addresses: tuple[Annotated[str, ADDRESS], ...] = ()
    mesh: bool = True
    enrolled: bool = True
    apps: tuple[App, ...] = ()

    @property
    def uid(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def captured(self) -> bool:
        return self.mesh and self.enrolled


class Port(_Base, frozen=True, kw_only=True):
    """`target_port` is the port on the pods, 0 for the same number."""

    port: Annotated[int, PORT]
    target_port: Annotated[int, PORT] = 0
    name: Annotated[str, LABEL] = ""


class Service(_Base, frozen=True, kw_only=True):
    """`selector` chooses pods of its namespace by their labels; `addresses` are its virtual
    ones.
    """

    name: Annotated[str, LABEL]
    namespace: Annotated[str, LABEL] = "default"
    ports: Annotated[tuple[Port, ...], NOT_EMPTY]
    selector: Annotated[dict[str, str], NOT_EMPTY]
    addresses: tuple[Annotated[str, ADDRESS], ...] = ()

    @property
    def uid(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def hostname(self) -> str:
        return f"{self.name}.{self.namespace}.svc.cluster.local"

    def selects(self, pod: Pod) -> bool:
        return pod.namespace == self.namespace and self.selector.items() <= pod.labels.items()


class Node(_Base, frozen=True, kw_only=True):
    """`settings` are further settings of the node's `nodeagent`, as in its settings file, and
    `ztunnel_arguments` further arguments of its `ztunnel`.
    """

    name: Annotated[str, LABEL]
    locality: str = ""
    ztunnel_arguments: tuple[str, ...] = ()
    settings: Annotated[dict[str, Any], IGNORED] = {}


class LabSpec(_Base, frozen=True, kw_only=True):
    """A whole lab. `resources` are Istio resources as they stand in the file.

    `congestion_control` is TCP's algorithm in every pod, empty for the kernel's own default.
    `large` gives every node room for 1,000 pods, by other addresses.
    """

    name: Annotated[str, LAB_NAME]
    nodes: Annotated[tuple[Node, ...], NOT_EMPTY]
    pods: tuple[Pod, ...] = ()
    services: tuple[Service, ...] = ()
    resources: Annotated[tuple[dict[str, Any], ...], IGNORED] = ()
    files: tuple[str, ...] = ()
    trust_domain: Annotated[str, TRUST_DOMAIN] = "cluster.local"
    congestion_control: Annotated[str, ALGORITHM] = ""
    mtu: Annotated[int, MTU] = 1500
    large: bool = False


class NodePlan(_Base, frozen=True, kw_only=True):
    """A node with its place: interface addresses are text with a prefix length."""

    index: int
    node: Node
    uplink: tuple[str, ...]
    gateways: tuple[str, ...]
    networks: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def port(self) -> str:
        """The node's interface in the fabric: what crosses it is what crosses the wire."""
        return f"node{self.index}"

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(text.partition("/")[0] for text in self.uplink)


class PodPlan(_Base, frozen=True, kw_only=True):
    """A pod with its addresses and its number on the lab."""

    index: int
    pod: Pod
    addresses: tuple[str, ...]

    @property
    def uid(self) -> str:
        return self.pod.uid

    @property
    def key(self) -> str:
        """The pod's name among files."""
        return f"{self.pod.namespace}.{self.pod.name}"

    @property
    def port(self) -> str:
        """The pod's interface in its node, at most 15 bytes (IFNAMSIZ)."""
        return f"pod{self.index}"


class ServicePlan(_Base, frozen=True, kw_only=True):
    service: Service
    addresses: tuple[str, ...]


class LabPlan(_Base, frozen=True, kw_only=True):
    """Everything that is decided before anything is made."""

    spec: LabSpec
    nodes: tuple[NodePlan, ...]
    pods: tuple[PodPlan, ...]
    services: tuple[ServicePlan, ...]

    def node_of(self, pod: PodPlan) -> NodePlan:
        return next(node for node in self.nodes if node.name == pod.pod.node)

    def pods_of(self, node: NodePlan) -> list[PodPlan]:
        return [pod for pod in self.pods if pod.pod.node == node.name]

    def without_pod(self, uid: str) -> LabPlan:
        """Return the plan without a pod."""
        return msgspec.structs.replace(self, pods=tuple(p for p in self.pods if p.uid != uid))

    def with_pod(self, changed: PodPlan) -> LabPlan:
        """Return the plan with one pod replaced by another of the same uid."""
        pods = tuple(changed if one.uid == changed.uid else one for one in self.pods)
        return msgspec.structs.replace(self, pods=pods)


class Layout(msgspec.Struct, frozen=True):
    """Where a lab keeps what it makes: everything lies below one directory, 0700."""

    directory: Path

    @property
    def state(self) -> Path:
        return self.directory / "state.json"

    @property
    def spaces(self) -> Path:
        return self.directory / "net"

    @property
    def bpf(self) -> Path:
        return self.directory / "bpf"

    @property
    def config(self) -> Path:
        return self.directory / "mesh.d"

    @property
    def ca(self) -> Path:
        return self.directory / "ca"

    @property
    def logs(self) -> Path:
        return self.directory / "logs"

    @property
    def fabric(self) -> Path:
        return self.spaces / "fabric"

    def node_space(self, node: str) -> Path:
        return self.spaces / f"node.{node}"

    def node_directory(self, node: str) -> Path:
        return self.directory / "nodes" / node

    def settings(self, node: str) -> Path:
        return self.node_directory(node) / "settings.yaml"

    def run(self, node: str) -> Path:
        return self.node_directory(node) / "run"

    def access_log(self, node: str) -> Path:
        return self.logs / f"{node}.access.json"

    def pod_space(self, pod: PodPlan) -> Path:
        return self.spaces / f"pod.{pod.key}"

    def hosts(self, pod: PodPlan) -> Path:
        return self.directory / "hosts" / pod.key

    def log(self, process: str) -> Path:
        """The output of a process, named as in the record: "NODE/ztunnel" or "NS/POD/APP"."""
        return self.logs / f"{process.replace('/', '.')}.log"
