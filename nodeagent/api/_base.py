"""What all resources share: metadata, selectors, the envelope, and the types of single fields.

This module owns the shapes that every resource is made of. It promises strict types, as `_types`
does; and that a document remembers where its parts stand, so that whoever reads it later can still
name a line. It may not know any resource.
"""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Any

import msgspec

from nodeagent.api import values
from nodeagent.api._errors import Origin
from nodeagent.api._walk import IGNORED, NULLABLE, Check

__all__ = [
    "DEFAULT_NAMESPACE",
    "DEFAULT_SERVICE_ACCOUNT",
    "Address",
    "BaseDocument",
    "Labels",
    "Mark",
    "ObjectMeta",
    "Port",
    "PortName",
    "Strict",
    "Text",
    "WorkloadSelector",
]

DEFAULT_NAMESPACE = "default"
"""The namespace of a document that names none, as in Kubernetes."""

DEFAULT_SERVICE_ACCOUNT = "default"
"""The service account of a workload that names none, as in Kubernetes."""

Labels = dict[Annotated[str, Check(values.label_key)], Annotated[str, Check(values.label_value)]]
Annotations = Annotated[
    dict[
        Annotated[str, Check(values.annotation_key)],
        Annotated[str, Check(values.annotation_value)],
    ],
    Check(values.metadata_annotations),
]
Port = Annotated[int, Check(values.port)]
PortName = Annotated[str, Check(values.dns_label)]
Address = Annotated[str, Check(values.address)]
Text = Annotated[str, Check(values.text)]
Ignored = Annotated[Any, IGNORED]


class Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel", gc=False):
    """A part of a document. Documents are trees: the garbage collector has nothing to find there,
    and a mesh has millions of parts to look through.
    """


class ObjectMeta(Strict, frozen=True, kw_only=True):
    """Kubernetes' metadata. What a server writes for itself is tolerated and left unread."""

    name: Annotated[str, Check(values.dns_subdomain)]
    namespace: Annotated[str, Check(values.dns_label)] = DEFAULT_NAMESPACE
    labels: Labels = {}
    annotations: Annotations = {}
    creation_timestamp: Annotated[dt.datetime | None, NULLABLE, Check(values.timestamp)] = None
    generate_name: Ignored = None
    self_link: Ignored = None
    uid: Ignored = None
    resource_version: Ignored = None
    generation: Ignored = None
    deletion_timestamp: Ignored = None
    deletion_grace_period_seconds: Ignored = None
    owner_references: Ignored = None
    finalizers: Ignored = None
    managed_fields: Ignored = None


class WorkloadSelector(Strict, frozen=True, kw_only=True):
    """Selects the workloads of the policy's namespace that carry all of `match_labels`.

    Never empty: a selector that lost its labels would select every workload, so it is refused.
    """

    match_labels: Labels


class Mark(msgspec.Struct, frozen=True, gc=False):
    """Where a field of a document stands. `refers` is the identity set that it names, if any."""

    field: str
    line: int
    column: int
    refers: str = ""


class BaseDocument(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    metadata: ObjectMeta
    origin: Origin
    marks: tuple[Mark, ...] = ()
    """The parts that others must be able to name by their line, in the document's order."""

    @property
    def uid(self) -> str:
        """The key within its kind: "namespace/name"."""
        return f"{self.metadata.namespace}/{self.metadata.name}"

    @property
    def age(self) -> tuple[dt.datetime, str]:
        """What the oldest of several is told by: creation, then uid. Without a time: the newest."""
        created = self.metadata.creation_timestamp
        return (created or _END_OF_TIME, self.uid)


_END_OF_TIME = dt.datetime.max.replace(tzinfo=dt.UTC)
