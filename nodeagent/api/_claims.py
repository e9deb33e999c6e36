"""What only one document may hold: names, network namespaces, workloads' addresses.

This module owns the list of exclusive claims. It promises that two documents which would fight over
an identity share a claim, so that whoever merges documents can refuse the second and name both
places; nobody takes over another's identity by writing a document. It may not choose a winner.

Virtual addresses of services are no claims: Istio lets several services share one, and the mesh
decides between them.
"""

from __future__ import annotations

from collections.abc import Iterable

from nodeagent.api import _binding
from nodeagent.api._errors import ConfigError
from nodeagent.api._types import Document, WorkloadEntry

__all__ = ["claims", "conflict", "own_conflicts"]


def claims(document: Document, node: str) -> dict[str, str]:
    """Return the claims of `document`, each with the field that makes it.

    `node` is this node's name: a binding without a node means this one.
    """
    name = f"{type(document).__name__} {document.uid}"
    result = {name: "metadata.name"}
    if isinstance(document, WorkloadEntry):
        for address in _binding.addresses(document):
            field = "spec.address" if address == document.spec.address else "metadata.annotations"
            result[f"address {address}"] = field
        binding = _binding.netns_binding(document)
        if binding is not None:
            where = binding.node or node
            result[f"network namespace {binding.netns} of node {where}"] = "metadata.annotations"
    return result


def conflict(document: Document, holder: Document, claim: str, field: str) -> ConfigError:
    """Return the error of `document`, whose `field` makes a `claim` that `holder` has."""
    origin = document.origin
    reason = (
        f"{claim} is already taken by {type(holder).__name__} {holder.uid} at {holder.origin}, "
        "which stays in force: change or remove one of the two"
    )
    return ConfigError(origin.file, origin.line, origin.column, field, reason)


def own_conflicts(documents: Iterable[Document], node: str) -> list[ConfigError]:
    """Return the errors of documents that conflict with one before them in the same file."""
    held: dict[str, Document] = {}
    errors: list[ConfigError] = []
    for document in documents:
        for claim, field in claims(document, node).items():
            holder = held.setdefault(claim, document)
            if holder is not document:
                errors.append(conflict(document, holder, claim, field))
    return errors
