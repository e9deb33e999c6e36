"""JSON Schemas of the resources, from the same types that the loader reads by.

This module owns the translation. It promises schemas which accept every document that the loader
accepts: where a grammar or a rule between fields cannot be said, the schema says less, never more.
So editors help, and only the loader judges. It may not read or write files.

Sources: JSON Schema 2020-12; Kubernetes apiextensions.k8s.io/v1, "structural schemas".
"""

from __future__ import annotations

import datetime as dt
import enum
import inspect
import typing
from collections.abc import Callable
from typing import Any, Final

import msgspec

from nodeagent.api import patterns, values
from nodeagent.api._authorization import IdentitySetSpec
from nodeagent.api._base import ObjectMeta
from nodeagent.api._loader import KINDS
from nodeagent.api._walk import IGNORED, NULLABLE, Check, Unused, fields_of, unwrap

__all__ = ["custom_resource_definitions", "json_schema", "json_schemas"]

Schema = dict[str, Any]

_DRAFT: Final = "https://json-schema.org/draft/2020-12/schema"

_LABEL: Final = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"

# What of a grammar a schema can say. What is not here is any text or list of its type.
_HINTS: Final[dict[Callable[[Any], Any], Schema]] = {
    values.dns_label: {"maxLength": values.MAX_LABEL, "pattern": f"^{_LABEL}$"},
    values.dns_subdomain: {
        "maxLength": values.MAX_SUBDOMAIN,
        "pattern": rf"^{_LABEL}(\.{_LABEL})*$",
    },
    values.port: {"minimum": 1, "maximum": values.MAX_PORT},
    values.weight: {"minimum": 1, "maximum": values.MAX_WEIGHT},
    values.label_value: {"maxLength": values.MAX_LABEL},
    patterns.not_empty: {"minItems": 1},
    patterns.principal: {"pattern": r"^(\*[^*]*|[^*]+\*?)$"},
    patterns.identity: {"pattern": r"^(spiffe://)?(\*[^*]*|[^*]+\*?)$"},
    patterns.namespace: {"pattern": r"^(\*[A-Za-z0-9._-]*|[A-Za-z0-9._-]+\*?)$"},
    patterns.account: {"pattern": r"^[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)?$"},
    patterns.block: {"pattern": r"^[0-9A-Fa-f.:]+(/[0-9]{1,3})?$"},
    patterns.port: {"pattern": "^[1-9][0-9]{0,4}$"},
    patterns.word: {"minLength": 1},
}


def json_schemas() -> dict[str, Schema]:
    """Return the schema of each kind."""
    return {kind: _document(kind) for kind in sorted(KINDS)}


def json_schema(title: str, cls: type[msgspec.Struct]) -> Schema:
    """Return the schema of a file that holds one mapping, read with `read_struct`."""
    return {"$schema": _DRAFT, "title": title, **_struct(cls)}


def custom_resource_definitions() -> dict[str, Schema]:
    """Return what a Kubernetes API server must be told of the kinds that are ours, by name."""
    group, _, version = KINDS["IdentitySet"][0][0].partition("/")
    plural = "identitysets"
    spec = _structural(_value(IdentitySetSpec))
    definition: Schema = {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{group}"},
        "spec": {
            "group": group,
            "names": {
                "kind": "IdentitySet",
                "listKind": "IdentitySetList",
                "plural": plural,
                "singular": "identityset",
            },
            "scope": "Namespaced",
            "versions": [
                {
                    "name": version,
                    "served": True,
                    "storage": True,
                    "schema": {
                        "openAPIV3Schema": {
                            "type": "object",
                            "required": ["spec"],
                            "properties": {"spec": spec},
                        }
                    },
                }
            ],
        },
    }
    return {definition["metadata"]["name"]: definition}


def _document(kind: str) -> Schema:
    versions, _, spec = KINDS[kind]
    return {
        "$schema": _DRAFT,
        "title": kind,
        "type": "object",
        "additionalProperties": False,
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "properties": {
            "apiVersion": {"enum": list(versions)},
            "kind": {"const": kind},
            "metadata": _value(ObjectMeta),
            "spec": _value(spec),
            "status": {},
        },
    }


def _value(kind: object) -> Schema:
    base, markers = unwrap(kind)
    if IGNORED in markers:
        return {}
    found = _typed(base)
    for marker in markers:
        if isinstance(marker, Check):
            found |= _HINTS.get(marker.function, {})
        elif isinstance(marker, Unused):
            found["description"] = marker.reason
    if NULLABLE in markers:
        found["type"] = [found["type"], "null"]
    return found


def _typed(base: object) -> Schema:
    origin = typing.get_origin(base)
    if origin is dict:
        key, value = typing.get_args(base)
        found: Schema = {"type": "object", "additionalProperties": _value(value)}
        if unwrap(key)[0] is int:
            found["propertyNames"] = {"pattern": "^[1-9][0-9]*$"}
        return found
    if origin is tuple:
        return {"type": "array", "items": _value(typing.get_args(base)[0])}
    if not isinstance(base, type):
        raise TypeError(f"no schema for the type {base!r}")
    if issubclass(base, msgspec.Struct):
        return _struct(base)
    if issubclass(base, enum.Enum):
        return {"type": "string", "enum": [member.value for member in base]}
    if base is dt.datetime:
        return {"type": "string", "format": "date-time"}
    return {"type": {str: "string", int: "integer", bool: "boolean"}[base]}


def _struct(cls: type[msgspec.Struct]) -> Schema:
    fields = fields_of(cls)
    found: Schema = {"type": "object", "additionalProperties": False}
    doc = vars(cls).get("__doc__")
    if doc:
        found["description"] = inspect.cleandoc(doc).partition("\n\n")[0].replace("\n", " ")
    required = [name for name, field in fields.items() if field.required]
    if required:
        found["required"] = required
    found["properties"] = {name: _value(field.kind) for name, field in fields.items()}
    return found


def _structural(schema: Schema) -> Schema:
    """Return a schema as API servers take it: closed by them, and without references."""
    found = {key: value for key, value in schema.items() if key != "additionalProperties"}
    if "properties" in found:
        found["properties"] = {
            name: _structural(each) for name, each in found["properties"].items()
        }
    if "items" in found:
        found["items"] = _structural(found["items"])
    return found
