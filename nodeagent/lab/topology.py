"""The lab's network: namespaces for the fabric, the nodes and the pods, and the links between.

    fabric            bridge `fabric`: the switch between the nodes; port `node1`, `node2` …
    node              `uplink` to the fabric, bridge `pods` with the pods' gateway, ports `pod1` …;
                      forwards, and has a route to every other node's pods
    pod               `eth0` with a default route; IPv4 and IPv6

This module owns building and removing that. It promises that nothing is made in the namespace of
the machine itself (so that nothing can stay behind there, and labs with equal addresses live side
by side), that addresses work at once, and that removal needs only the lab's directory. It may not
start processes.

In a large lab no pod ever asks for a hardware address: a broadcast to a thousand ports overruns the
kernel's queue of received packets (net.core.netdev_max_backlog, 1,000), and the answer is what it
drops. So pods have host addresses, everything goes by way of the gateway, and gateway and pods know
each other's hardware address from the start.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from functools import partial
from pathlib import Path
from typing import Final

from pyroute2 import IPRoute

from nodeagent.lab import namespaces
from nodeagent.lab.model import LabPlan, Layout, NodePlan, PodPlan

__all__ = ["Topology"]

LOOPBACK: Final = 1
IFA_F_NODAD: Final = 0x02

BRIDGE_MAC: Final = "02:6e:6f:64:65:{:02x}"
"""A bridge without an address of its own takes its lowest port's: neighbours would keep a stale one
whenever a pod is added."""

ADDRESSES_AT_ONCE: Final = {
    "net/ipv6/conf/all/accept_dad": "0",
    "net/ipv6/conf/default/accept_dad": "0",
    "net/ipv6/conf/all/accept_ra": "0",
    "net/ipv6/conf/default/accept_ra": "0",
}
FORWARDING: Final = {"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1"}
POD: Final = {"net/ipv4/ip_unprivileged_port_start": "0"}
"""As container runtimes do: programs without capabilities may listen on port 80."""

NO_DETOURS: Final = {
    f"net/{family}/conf/{name}/accept_redirects": "0"
    for family in ("ipv4", "ipv6")
    for name in ("all", "default")
}
"""A pod of a large lab must not be told that its neighbour is on the same link."""

CONGESTION_CONTROL: Final = "net/ipv4/tcp_congestion_control"


def _pod_mac(pod: PodPlan) -> str:
    """Return the pod's hardware address: the same for the same address, or neighbours would keep
    that of a pod which had the address before.
    """
    tail = ipaddress.ip_address(pod.addresses[0]).packed[-4:]
    return "0a:58:" + tail.hex(":")


def _sysctls(values: dict[str, str]) -> None:
    for name, value in values.items():
        (Path("/proc/sys") / name).write_text(value)


def _index(link: IPRoute, name: str) -> int:
    (index,) = link.link_lookup(ifname=name)
    return int(index)


def _up(link: IPRoute, name: str, addresses: tuple[str, ...] = ()) -> int:
    index = _index(link, name)
    link.link("set", index=index, state="up")
    for text in addresses:
        interface = ipaddress.ip_interface(text)
        link.addr(
            "add",
            index=index,
            address=str(interface.ip),
            prefixlen=interface.network.prefixlen,
            **({"flags": IFA_F_NODAD} if interface.version == 6 else {}),  # noqa: PLR2004 - of IP
        )
    return index


def _route(link: IPRoute, destination: str, gateway: str, **more: int | list[str]) -> None:
    network = ipaddress.ip_network(destination)
    family = socket.AF_INET if network.version == 4 else socket.AF_INET6  # noqa: PLR2004 - of IP
    link.route("add", family=family, dst=str(network), gateway=gateway, **more)


def _neighbour(link: IPRoute, index: int, address: str, mac: str) -> None:
    link.neigh("replace", dst=address, lladdr=mac, ifindex=index, state="permanent")


def _veth(
    link: IPRoute, name: str, peer: str, space: Path, mtu: int, mac: str | None = None
) -> None:
    """Make a pair: `name` here, `peer` (with `mac`) in the namespace at `space`."""
    hardware = {} if mac is None else {"address": mac}
    descriptor = os.open(space, os.O_RDONLY | os.O_CLOEXEC)
    try:
        link.link(
            "add",
            ifname=name,
            kind="veth",
            mtu=mtu,
            peer={"ifname": peer, "net_ns_fd": descriptor, "mtu": mtu, **hardware},
        )
    finally:
        os.close(descriptor)


def _enslave(link: IPRoute, bridge: str, name: str) -> None:
    link.link("set", index=_index(link, name), master=_index(link, bridge), state="up")


def _unplug(port: str) -> None:
    with IPRoute() as link:
        link.link("del", index=_index(link, port))


class Topology:
    """Builds the namespaces of one plan below one directory, and removes them."""

    def __init__(self, plan: LabPlan, layout: Layout) -> None:
        self._plan = plan
        self._layout = layout

    def build(self) -> None:
        """Make everything. Raises OSError or pyroute2's NetlinkError; `remove` undoes any part."""
        self._layout.spaces.mkdir(mode=0o700)
        namespaces.create(self._layout.fabric)
        namespaces.run_in(self._layout.fabric, self._build_fabric)
        for node in self._plan.nodes:
            space = self._layout.node_space(node.name)
            namespaces.create(space)
            namespaces.run_in(space, partial(self._build_node, node))
            namespaces.run_in(self._layout.fabric, partial(self._plug_node, node))
        for pod in self._plan.pods:
            self.add_pod(pod)

    def add_pod(self, pod: PodPlan) -> None:
        """Make one pod's namespace and connect it to its node."""
        node = self._plan.node_of(pod)
        space = self._layout.pod_space(pod)
        namespaces.create(space)
        # Before there is an interface: it takes its own settings from the namespace's.
        namespaces.run_in(space, self._prepare_pod)
        namespaces.run_in(self._layout.node_space(node.name), partial(self._plug_pod, pod))
        namespaces.run_in(space, partial(self._build_pod, node, pod))

    def remove_pod(self, pod: PodPlan) -> None:
        """Unplug one pod and let go of its namespace, which ends with the last process in it."""
        node = self._plan.node_of(pod)
        namespaces.run_in(self._layout.node_space(node.name), partial(_unplug, pod.port))
        namespaces.remove(self._layout.pod_space(pod))

    def _build_fabric(self) -> None:
        _sysctls(ADDRESSES_AT_ONCE)
        with IPRoute() as link:
            link.link("set", index=LOOPBACK, state="up")
            self._bridge(link, "fabric", 0)
            _up(link, "fabric")

    def _bridge(self, link: IPRoute, name: str, number: int) -> None:
        # Without a querier, snooping would sooner or later drop IPv6 neighbour discovery.
        link.link(
            "add",
            ifname=name,
            kind="bridge",
            br_mcast_snooping=0,
            address=BRIDGE_MAC.format(number),
            mtu=self._plan.spec.mtu,
        )

    def _build_node(self, node: NodePlan) -> None:
        _sysctls(ADDRESSES_AT_ONCE | FORWARDING)
        with IPRoute() as link:
            link.link("set", index=LOOPBACK, state="up")
            _veth(link, "uplink", node.port, self._layout.fabric, self._plan.spec.mtu)
            _up(link, "uplink", node.uplink)
            self._bridge(link, "pods", node.index)
            _up(link, "pods", node.gateways)
            for other in self._plan.nodes:
                if other is not node:
                    for network, gateway in zip(other.networks, other.addresses, strict=True):
                        _route(link, network, gateway)

    def _plug_node(self, node: NodePlan) -> None:
        with IPRoute() as link:
            _enslave(link, "fabric", node.port)

    def _plug_pod(self, pod: PodPlan) -> None:
        with IPRoute() as link:
            space, mtu = self._layout.pod_space(pod), self._plan.spec.mtu
            _veth(link, pod.port, "eth0", space, mtu, _pod_mac(pod))
            _enslave(link, "pods", pod.port)
            if self._plan.spec.large:
                for address in pod.addresses:
                    _neighbour(link, _index(link, "pods"), address, _pod_mac(pod))

    def _prepare_pod(self) -> None:
        _sysctls(ADDRESSES_AT_ONCE | POD | (NO_DETOURS if self._plan.spec.large else {}))
        if self._plan.spec.congestion_control:
            _sysctls({CONGESTION_CONTROL: self._plan.spec.congestion_control})

    def _build_pod(self, node: NodePlan, pod: PodPlan) -> None:
        gateways = [ipaddress.ip_interface(text) for text in node.gateways]
        with IPRoute() as link:
            link.link("set", index=LOOPBACK, state="up")
            for text in pod.addresses:
                address = ipaddress.ip_address(text)
                gateway = next(one for one in gateways if one.version == address.version)
                anywhere = "0.0.0.0/0" if address.version == 4 else "::/0"  # noqa: PLR2004 - of IP
                if self._plan.spec.large:
                    index = _up(link, "eth0", (f"{address}/{address.max_prefixlen}",))
                    _neighbour(link, index, str(gateway.ip), BRIDGE_MAC.format(node.index))
                    _route(link, anywhere, str(gateway.ip), oif=index, flags=["onlink"])
                else:
                    _up(link, "eth0", (f"{address}/{gateway.network.prefixlen}",))
                    _route(link, anywhere, str(gateway.ip))
