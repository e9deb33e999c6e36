"""Workloads as policy sees them.

This module owns that view, and how those that a policy may concern are found among very many. It
promises nothing about policies, which it does not know.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

__all__ = ["Subject", "Subjects"]


class Subject(msgspec.Struct, frozen=True, gc=False):
    """`uid` is "namespace/name". `in_mesh` is false for one that is reached without HBONE."""

    uid: str
    namespace: str
    labels: dict[str, str]
    in_mesh: bool = True


class Subjects(msgspec.Struct, frozen=True, eq=False):
    """All of a mesh: by namespace and uid, and once more those `outside` the mesh, by uid.

    Equal only to itself, so that a hundred thousand need not be compared.
    """

    namespaces: dict[str, dict[str, Subject]]
    outside: dict[str, Subject]

    @classmethod
    def of(cls, subjects: Iterable[Subject]) -> Subjects:
        namespaces: dict[str, dict[str, Subject]] = {}
        outside: dict[str, Subject] = {}
        for subject in subjects:
            namespaces.setdefault(subject.namespace, {})[subject.uid] = subject
            if not subject.in_mesh:
                outside[subject.uid] = subject
        return cls(namespaces, outside)

    def all(self) -> Iterable[Subject]:
        return (each for inside in self.namespaces.values() for each in inside.values())

    def get(self, uid: str) -> Subject | None:
        return self.namespaces.get(uid.partition("/")[0], {}).get(uid)

    def some(self, uids: Iterable[str]) -> list[Subject]:
        """Return those of `uids` that there are."""
        return [subject for uid in uids if (subject := self.get(uid)) is not None]
