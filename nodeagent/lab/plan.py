"""From a lab's description to everything that is decided before anything is made.

This module owns the lab's address plan and its generated documents: each node's settings file, the
mesh documents that all nodes share, and each pod's /etc/hosts. It is pure: the same description
gives the same plan, byte for byte. It may not touch the system.

Addresses are the same in every lab, for no lab can see another: nodes 172.18.0.<i>, pods of node
<i> 10.244.<i>.0/24, in a large lab 10.(128+<i>).0.0/16, services 10.96.0.0/16, each with its IPv6
twin.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator
from typing import Any, Final

import msgspec

from nodeagent.lab.model import (
    LabPlan,
    LabSpec,
    Layout,
    NodePlan,
    Pod,
    PodPlan,
    Service,
    ServicePlan,
)

__all__ = [
    "hosts",
    "make",
    "max_nodes",
    "max_pods",
    "mesh_documents",
    "networks",
    "settings",
]

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

MAX_NODES: Final = 200
"""Nodes of a lab: their number is one octet of the pods' addresses."""
MAX_PODS: Final = 200
"""Pods of a node: a /24 holds 253 beside the gateway."""
MAX_LARGE_NODES: Final = 100
"""10.129 to 10.228: no other network of the lab lies there."""
MAX_LARGE_PODS: Final = 1020
"""A bridge has 1,024 ports (BR_MAX_PORTS, net/bridge/br_private.h)."""

FABRIC: Final = ("172.18.0.0/24", "fd00:172:18::/64")
PODS: Final = ("10.244.{}.0/24", "fd00:10:244:{:x}::/64")
LARGE: Final = ("10.{}.0.0/16", 128)
"""IPv4 of a large lab's pods: the second octet is the node's number and this."""
SERVICES: Final = ("10.96.0.0/16", "fd00:10:96::/112")

ANNOTATION_NETNS: Final = "nodeagent.io/netns"
ANNOTATION_ADDRESSES: Final = "nodeagent.io/addresses"
ADMIN_ADDRESS: Final = "127.0.0.1:15000"


def max_nodes(spec: LabSpec) -> int:
    return MAX_LARGE_NODES if spec.large else MAX_NODES


def max_pods(spec: LabSpec) -> int:
    """Return how many pods each node may have."""
    return MAX_LARGE_PODS if spec.large else MAX_PODS


def networks(index: int, *, large: bool = False) -> tuple[str, ...]:
    """Return the pod networks of the node with this number, counted from 1."""
    found = tuple(text.format(index) for text in PODS)
    text, first = LARGE
    return (text.format(first + index), *found[1:]) if large else found


def make(spec: LabSpec) -> LabPlan:
    """Return the plan of a valid description (`spec.load` has checked it)."""
    nodes = tuple(_node(index, spec) for index in range(1, len(spec.nodes) + 1))
    pods: list[PodPlan] = []
    for node in nodes:
        mine = [pod for pod in spec.pods if pod.node == node.name]
        free = _free(node, mine)
        for pod in mine:
            addresses = pod.addresses or tuple(str(next(each)) for each in free)
            pods.append(PodPlan(index=len(pods) + 1, pod=pod, addresses=addresses))
    return LabPlan(spec=spec, nodes=nodes, pods=tuple(pods), services=tuple(_services(spec)))


def add(plan: LabPlan, pod: Pod) -> LabPlan:
    """Return the plan with one pod more, whose node exists; everything else keeps its place."""
    node = next(each for each in plan.nodes if each.name == pod.node)
    taken = [msgspec.structs.replace(one.pod, addresses=one.addresses) for one in plan.pods]
    addresses = pod.addresses or tuple(str(next(each)) for each in _free(node, taken))
    index = max((one.index for one in plan.pods), default=0) + 1
    added = PodPlan(index=index, pod=pod, addresses=addresses)
    return msgspec.structs.replace(plan, pods=(*plan.pods, added))


def _node(index: int, spec: LabSpec) -> NodePlan:
    pods = networks(index, large=spec.large)
    return NodePlan(
        index=index,
        node=spec.nodes[index - 1],
        uplink=tuple(_interface(text, index) for text in FABRIC),
        gateways=tuple(_interface(text, 1) for text in pods),
        networks=pods,
    )


def _interface(network: str, number: int) -> str:
    whole = ipaddress.ip_network(network)
    return f"{whole[number]}/{whole.prefixlen}"


def _unused(network: str, first: int, taken: set[Address]) -> Iterator[Address]:
    whole: Network = ipaddress.ip_network(network)
    number = first
    while True:
        address = whole[number]
        if address not in taken:
            yield address
        number += 1


def _free(node: NodePlan, pods: Iterable[Pod]) -> list[Iterator[Address]]:
    taken = {ipaddress.ip_address(text) for pod in pods for text in pod.addresses}
    return [_unused(network, 2, taken) for network in node.networks]


def _services(spec: LabSpec) -> Iterator[ServicePlan]:
    taken = {ipaddress.ip_address(text) for one in spec.services for text in one.addresses}
    free = [_unused(network, 1, taken) for network in SERVICES]
    for service in spec.services:
        addresses = service.addresses or tuple(str(next(each)) for each in free)
        yield ServicePlan(service=service, addresses=addresses)


def settings(plan: LabPlan, node: NodePlan, layout: Layout) -> dict[str, Any]:
    """Return the settings of one node's `nodeagent`."""
    own = {
        "node": node.name,
        "trust_domain": plan.spec.trust_domain,
        "locality": node.node.locality,
        "node_addresses": [*node.addresses, *(text.partition("/")[0] for text in node.gateways)],
        "run_dir": str(layout.run(node.name)),
        "state_dir": str(layout.node_directory(node.name) / "state"),
        "config_dir": str(layout.config),
        "ca_dir": str(layout.ca),
        "bpf_dir": str(layout.bpf / node.name),
        "admin_address": ADMIN_ADDRESS,
    }
    return own | node.node.settings


def mesh_documents(plan: LabPlan, layout: Layout) -> dict[str, list[dict[str, Any]]]:
    """Return the shared configuration: file name to documents."""
    files = {
        f"workload.{pod.key}.yaml": [workload(plan, pod, layout)]
        for pod in plan.pods
        if pod.pod.mesh
    }
    for service in plan.services:
        name = f"service.{service.service.namespace}.{service.service.name}.yaml"
        files[name] = [_service(plan, service)]
    if plan.spec.resources:
        files["resources.yaml"] = list(plan.spec.resources)
    return files


def workload(plan: LabPlan, pod: PodPlan, layout: Layout) -> dict[str, Any]:
    """Return the WorkloadEntry of a pod; only an enrolled one is bound to its namespace."""
    annotations = dict(pod.pod.annotations)
    if pod.pod.enrolled:
        annotations[ANNOTATION_NETNS] = f"{pod.pod.node}:{layout.pod_space(pod)}"
    if len(pod.addresses) > 1:
        annotations[ANNOTATION_ADDRESSES] = ",".join(pod.addresses[1:])
    spec: dict[str, Any] = {
        "address": pod.addresses[0],
        "labels": dict(pod.pod.labels),
        "serviceAccount": pod.pod.service_account,
    }
    if locality := plan.node_of(pod).node.locality:
        spec["locality"] = locality
    metadata: dict[str, Any] = {"name": pod.pod.name, "namespace": pod.pod.namespace}
    if pod.pod.labels:
        metadata["labels"] = dict(pod.pod.labels)
    if annotations:
        metadata["annotations"] = annotations
    return {
        "apiVersion": "networking.istio.io/v1",
        "kind": "WorkloadEntry",
        "metadata": metadata,
        "spec": spec,
    }


def _service(plan: LabPlan, planned: ServicePlan) -> dict[str, Any]:
    service = planned.service
    spec: dict[str, Any] = {
        "hosts": [service.hostname],
        "addresses": list(planned.addresses),
        "location": "MESH_INTERNAL",
        "resolution": "STATIC",
        "ports": [
            {
                "number": port.port,
                "name": port.name or f"tcp-{port.port}",
                "protocol": "TCP",
                "targetPort": port.target_port or port.port,
            }
            for port in service.ports
        ],
    }
    chosen = _endpoints(plan, service)
    if all(pod.pod.mesh for pod in chosen):
        spec["workloadSelector"] = {"labels": dict(service.selector)}
    else:
        # A selector finds only what the mesh knows; pods outside it have to be named.
        spec["endpoints"] = [{"address": text} for pod in chosen for text in pod.addresses]
    return {
        "apiVersion": "networking.istio.io/v1",
        "kind": "ServiceEntry",
        "metadata": {"name": service.name, "namespace": service.namespace},
        "spec": spec,
    }


def _endpoints(plan: LabPlan, service: Service) -> list[PodPlan]:
    return [pod for pod in plan.pods if service.selects(pod.pod)]


def hosts(plan: LabPlan, pod: PodPlan, *, captured: bool) -> str:
    """Return a pod's /etc/hosts.

    A captured pod finds a service's virtual addresses: they lead nowhere but into the tunnel. Any
    other pod finds the addresses of the service's pods, so it must call the port that they
    listen on.
    """
    lines = ["127.0.0.1 localhost", "::1 localhost ip6-localhost ip6-loopback"]
    names: set[str] = set()
    for planned in plan.services:
        service = planned.service
        aliases = [f"{service.name}.{service.namespace}", f"{service.name}.{service.namespace}.svc"]
        if service.namespace == pod.pod.namespace:
            aliases.insert(0, service.name)
        names.update(aliases)
        found = (
            planned.addresses
            if captured
            else [text for one in _endpoints(plan, service) for text in one.addresses]
        )
        lines += [f"{address} {' '.join([*aliases, service.hostname])}" for address in found]
    # As in a cluster, where pods are called name-x7k2p, the service's name wins over the pod's.
    if pod.pod.name not in names:
        lines += [f"{address} {pod.pod.name}" for address in pod.addresses]
    return "\n".join(lines) + "\n"
