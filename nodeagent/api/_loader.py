"""Files to resources: what a file of YAML or JSON documents holds, and everything wrong with it.

This module owns the envelope of a document (apiVersion, kind, metadata, spec) and the kinds that
exist. It promises that `load` never raises for any bytes: it returns documents, errors with places,
and warnings; and that a kind which is not enforced is refused, never skipped. It may not read files
or compare documents of different files.
"""

from __future__ import annotations

from typing import Any, Final, TypeVar

import msgspec

from nodeagent.api._authorization import AuthorizationPolicySpec, IdentitySetSpec
from nodeagent.api._base import Mark, ObjectMeta
from nodeagent.api._claims import own_conflicts
from nodeagent.api._errors import ConfigError, ConfigWarning, Origin, quote
from nodeagent.api._rules import check, marked
from nodeagent.api._scalars import is_null, read_string
from nodeagent.api._tree import MAX_ERRORS, Mapping, Node, Scalar, Sequence, join, read_tree
from nodeagent.api._types import (
    AuthorizationPolicy,
    Document,
    IdentitySet,
    PeerAuthentication,
    PeerAuthenticationSpec,
    ServiceEntry,
    ServiceEntrySpec,
    WorkloadEntry,
    WorkloadEntrySpec,
)
from nodeagent.api._walk import Walker

__all__ = ["KINDS", "Loaded", "load", "load_file", "read_struct", "read_struct_of_list"]

T = TypeVar("T", bound=msgspec.Struct)

_SECURITY: Final = ("security.istio.io/v1", "security.istio.io/v1beta1")
_NETWORKING: Final = (
    "networking.istio.io/v1",
    "networking.istio.io/v1beta1",
    "networking.istio.io/v1alpha3",
)

_OWN: Final = ("nodeagent.io/v1alpha1",)

KINDS: Final[dict[str, tuple[tuple[str, ...], type[Document], type[msgspec.Struct]]]] = {
    "PeerAuthentication": (_SECURITY, PeerAuthentication, PeerAuthenticationSpec),
    "WorkloadEntry": (_NETWORKING, WorkloadEntry, WorkloadEntrySpec),
    "ServiceEntry": (_NETWORKING, ServiceEntry, ServiceEntrySpec),
    "AuthorizationPolicy": (_SECURITY, AuthorizationPolicy, AuthorizationPolicySpec),
    "IdentitySet": (_OWN, IdentitySet, IdentitySetSpec),
}
"""The kinds that are read: their versions, and the types of the document and its spec."""

# Kinds whose authors expect protection. They are refused by name, so that nobody relies on them.
_NOT_ENFORCED: Final = {
    "RequestAuthentication": "RequestAuthentication is for layer 7, which this agent does not read",
}

_ENVELOPE: Final = frozenset({"apiVersion", "kind", "metadata", "spec", "status"})
_LIST_ENVELOPE: Final = frozenset({"apiVersion", "kind", "metadata", "items"})


class Loaded(msgspec.Struct, frozen=True):
    """What a file holds. With any error the file is refused as a whole."""

    documents: tuple[Document, ...]
    errors: tuple[ConfigError, ...]
    warnings: tuple[ConfigWarning, ...]


def load(data: bytes, file: str, node: str = "") -> Loaded:
    """Return what `data` holds. `file` names it in errors; `node` is this node's name.

    Never raises. Every document that is right is returned, also beside others that are not.
    """
    roots, errors = read_tree(data, file)
    walker = Walker(file)
    documents: list[Document] = []
    for root in roots:
        if not (isinstance(root, Scalar) and is_null(root)):
            documents.extend(_read_root(walker, root))
    found = [*errors, *walker.errors]
    found.extend(own_conflicts(documents, node))
    found.sort(key=lambda error: (error.line, error.column))
    if len(found) > MAX_ERRORS:
        rest = len(found) - MAX_ERRORS
        found[MAX_ERRORS:] = [ConfigError(file, 0, 0, "", f"and {rest} more errors")]
    return Loaded(tuple(documents), tuple(found), tuple(walker.warnings[:MAX_ERRORS]))


def load_file(data: bytes, file: str, node: str = "") -> Loaded:
    """Return what a whole file holds, as `load`; but a file that is empty is refused.

    What a crash, a full disk or a broken pipe leaves of a file must not take its policies away.
    """
    if not data.strip():
        reason = "is empty: to remove its documents, delete the file"
        return Loaded((), (ConfigError(file, 0, 0, "", reason),), ())
    return load(data, file, node)


def _read_root(walker: Walker, root: Node) -> list[Document]:
    if not isinstance(root, Mapping):
        walker.error(root, "", "must be a resource: a mapping with apiVersion, kind and metadata")
        return []
    if _word(walker, root, "kind", "", report=False) != "List":
        document = _read_document(walker, root, "")
        return [] if document is None else [document]
    return _read_list(walker, root)


def _read_list(walker: Walker, root: Mapping) -> list[Document]:
    """Read what `kubectl get -o yaml` writes for several objects."""
    _check_envelope(walker, root, _LIST_ENVELOPE, "")
    version = _word(walker, root, "apiVersion", "")
    if version not in {None, "v1"}:
        walker.error(root.entries["apiVersion"][1], "apiVersion", "a List is of apiVersion v1")
    items = root.get("items")
    if not isinstance(items, Sequence):
        walker.error(items or root, "items", "must be a list of resources")
        return []
    documents: list[Document] = []
    for index, item in enumerate(items.items):
        path = join("items", index)
        if not isinstance(item, Mapping):
            walker.error(item, path, "must be a resource")
            continue
        document = _read_document(walker, item, path)
        if document is not None:
            documents.append(document)
    return documents


def _read_document(walker: Walker, root: Mapping, path: str) -> Document | None:
    before = len(walker.errors)
    version = _word(walker, root, "apiVersion", path)
    kind = _word(walker, root, "kind", path)
    if version is None or kind is None:
        return None
    reason = _refusal(version, kind)
    if reason:
        walker.error(root.entries["kind"][1], join(path, "kind"), reason)
        return None
    _, cls, spec_cls = KINDS[kind]
    _check_envelope(walker, root, _ENVELOPE, path)
    metadata = _part(walker, root, "metadata", ObjectMeta, path)
    spec = _part(walker, root, "spec", spec_cls, path)
    if metadata is None or spec is None:
        return None
    origin = Origin(walker.file, root.line, root.column)
    make: Any = cls
    document: Document = make(metadata=metadata, spec=spec, origin=origin)
    check(walker, document, root, path)
    if len(walker.errors) != before:
        return None
    return marked(walker, document, root, path)


def _refusal(version: str, kind: str) -> str:
    """Return why a document of this kind is refused, or "" if it is read."""
    if kind in _NOT_ENFORCED:
        return (
            f"{_NOT_ENFORCED[kind]}; it is refused so that nobody relies on it: remove the document"
        )
    if kind not in KINDS:
        known = ", ".join(sorted(KINDS))
        return (
            f"the kind {quote(kind)} is not read by this version; known: {known} and List of them"
        )
    versions = KINDS[kind][0]
    if version not in versions:
        return f"{kind} is not read in apiVersion {quote(version)}; known: {', '.join(versions)}"
    return ""


def _check_envelope(walker: Walker, root: Mapping, known: frozenset[str], path: str) -> None:
    for text, (key, _) in root.entries.items():
        if text not in known:
            reason = f"unknown field; known here: {', '.join(sorted(known))}"
            walker.error(key, join(path, text), reason)


def _part(
    walker: Walker, root: Mapping, name: str, cls: type[msgspec.Struct], path: str
) -> msgspec.Struct | None:
    node = root.get(name)
    if node is None:
        walker.error(root, join(path, name), "is missing: add it")
        return None
    return walker.read(node, cls, join(path, name))


def _word(
    walker: Walker, root: Mapping, name: str, path: str, *, report: bool = True
) -> str | None:
    node = root.get(name)
    reason = "is missing: add it"
    if node is not None:
        reason = "must be a word"
        if isinstance(node, Scalar):
            try:
                return read_string(node)
            except ValueError as error:
                reason = str(error)
    if report:
        walker.error(node or root, join(path, name), reason)
    return None


def read_struct(data: bytes, file: str, cls: type[T]) -> T:
    """Return the one mapping that `data` holds as a `cls`, a struct with the walker's markers.

    Raises ConfigError with the first error, and the others in `others`. An empty file is an empty
    mapping.
    """
    return _read_struct(data, file, cls)[0]


def read_struct_lines(data: bytes, file: str, cls: type[T]) -> tuple[T, dict[str, int]]:
    """Return a struct as `read_struct` does, and the line of each field that is set, by its path.

    A mapping's own fields have paths too (`limits.dials`); a list has one line.
    """
    value, root = _read_struct(data, file, cls)
    lines: dict[str, int] = {}
    left: list[tuple[str, Node]] = [("", root)]
    while left:
        path, node = left.pop()
        if path:
            lines[path] = node.line
        if isinstance(node, Mapping):
            left += [(join(path, name), below) for name, (_, below) in node.entries.items()]
    return value, lines


def read_struct_of_list(
    data: bytes, file: str, cls: type[T], field: str
) -> tuple[T, tuple[Mark, ...]]:
    """Return a struct as `read_struct` does, and where the items of its list `field` stand."""
    value, root = _read_struct(data, file, cls)
    found = root.get(field) if isinstance(root, Mapping) else None
    items = found.items if isinstance(found, Sequence) else []
    return value, tuple(
        Mark(join(field, index), item.line, item.column) for index, item in enumerate(items)
    )


def _read_struct(data: bytes, file: str, cls: type[T]) -> tuple[T, Node]:
    roots, errors = read_tree(data, file)
    walker = Walker(file)
    value: T | None = None
    root: Node = Mapping(1, 1)
    if not errors:
        if len(roots) > 1:
            walker.error(roots[1], "", "a second document: this file holds one")
        root = roots[0] if roots else root
        if isinstance(root, Scalar) and is_null(root):
            root = Mapping(1, 1)
        value = walker.read(root, cls, "")
    errors = sorted([*errors, *walker.errors], key=lambda error: (error.line, error.column))
    if errors or value is None:
        first, *rest = errors
        raise ConfigError(
            first.file, first.line, first.column, first.field, first.reason, tuple(rest)
        )
    return value, root
