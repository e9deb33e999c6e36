"""The pods' descriptors that others keep for us: a running ztunnel, and the service manager.

This module owns the listeners that may be adopted instead of opened anew, and their names in the
service manager's store. It promises that a descriptor is closed once it is adopted or unwanted, and
that the store holds exactly the descriptors of enrolled pods. It may not decide which pods are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from nodeagent.capture.model import Enrolment, Listeners
from nodeagent.channel import close_all
from nodeagent.sdnotify import ServiceManager, StoredDescriptor, is_socket

__all__ = ["KeptDescriptors"]

_ROLES: Final = Listeners._fields
_NETNS: Final = "netns"
_SEPARATOR: Final = "|"
"""Between a pod's uid and a role in a stored name: in no uid, and allowed by systemd."""


class KeptDescriptors:
    """Offers of listeners by pod uid, and the store."""

    def __init__(self, manager: ServiceManager, stored: Iterable[StoredDescriptor]) -> None:
        """`stored` are the descriptors that the manager passed at start: they become ours."""
        self._manager = manager
        self._offers: dict[str, Listeners] = {}
        self._kept: dict[str, Enrolment] = {}
        found: dict[str, dict[str, int]] = {}
        for each in stored:
            uid, _, role = each.name.rpartition(_SEPARATOR)
            if uid and role in _ROLES and is_socket(each.fd) and role not in found.get(uid, {}):
                found.setdefault(uid, {})[role] = each.fd
            else:
                # A namespace's is found again by the binding; the store was only to keep it alive.
                close_all((each.fd,))
        for uid, roles in found.items():
            if len(roles) == len(_ROLES):
                self._offers[uid] = Listeners(**roles)
            else:
                close_all(roles.values())

    def offer(self, uid: str, listeners: Listeners) -> None:
        """Take over listeners that a ztunnel holds; they replace an earlier offer."""
        close_all(self._offers.pop(uid, ()))
        self._offers[uid] = listeners

    def listeners(self, uid: str) -> Listeners | None:
        """Return the listeners to adopt, still ours."""
        return self._offers.get(uid)

    def keep(self, enrolment: Enrolment) -> None:
        """Store an enrolled pod's descriptors, and let go of the offer that it was made from."""
        uid = enrolment.uid
        close_all(self._offers.pop(uid, ()))
        if self._kept.get(uid) == enrolment:
            return
        self._forget_stored(uid)
        self._manager.store(uid + _SEPARATOR + _NETNS, enrolment.netns)
        for role, fd in zip(_ROLES, enrolment.listeners, strict=True):
            self._manager.store(uid + _SEPARATOR + role, fd)
        self._kept[uid] = enrolment

    def forget(self, uid: str) -> None:
        """The pod is gone: drop it from the store and close what was offered for it."""
        close_all(self._offers.pop(uid, ()))
        self._kept.pop(uid, None)
        self._forget_stored(uid)

    def retain(self, wanted: Callable[[str], bool]) -> None:
        """Close the offers of pods (uids) that are not wanted."""
        for uid in [uid for uid in self._offers if not wanted(uid)]:
            self.forget(uid)

    def _forget_stored(self, uid: str) -> None:
        for role in (_NETNS, *_ROLES):
            self._manager.forget(uid + _SEPARATOR + role)

    def close(self) -> None:
        """Close every offer; the store stays."""
        for listeners in self._offers.values():
            close_all(listeners)
        self._offers.clear()
