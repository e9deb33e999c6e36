"""Pods of this node: from a binding to an open network namespace, and what is inside it.

This package owns entering namespaces, telling them apart for ever, and noticing that they come and
go. It promises never to move the caller's thread into another namespace. It may not change anything
inside a namespace: that is the capture's work.
"""

from nodeagent.pods.interfaces import (
    AddressesMissingError,
    read_interfaces,
    wait_for_addresses,
)
from nodeagent.pods.netns import NetnsError, NetnsHandle, NetnsReason, open_netns, pod_uid
from nodeagent.pods.threads import NamespaceThreads
from nodeagent.pods.values import Address, Device, Interfaces
from nodeagent.pods.watch import Appeared, Change, Gone, PodWatcher, Unusable

__all__ = [
    "Address",
    "AddressesMissingError",
    "Appeared",
    "Change",
    "Device",
    "Gone",
    "Interfaces",
    "NamespaceThreads",
    "NetnsError",
    "NetnsHandle",
    "NetnsReason",
    "PodWatcher",
    "Unusable",
    "open_netns",
    "pod_uid",
    "read_interfaces",
    "wait_for_addresses",
]
