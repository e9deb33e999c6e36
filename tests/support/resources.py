"""Builders of resources for tests, so that a test shows only what it is about.

Each returns the text of one document; `docs` joins them; `read` loads them and insists that they
are right, `refuse` that they are not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nodeagent.api import ConfigError, Document, load

__all__ = ["authorization", "docs", "identities", "peer", "read", "refuse", "service", "workload"]


def _document(
    version: str, kind: str, uid: str, spec: Mapping[str, Any], metadata: Mapping[str, Any]
) -> str:
    namespace, _, name = uid.rpartition("/")
    found: dict[str, Any] = {"name": name, **metadata}
    if namespace:
        found["namespace"] = namespace
    document = {"apiVersion": version, "kind": kind, "metadata": found, "spec": dict(spec)}
    return json.dumps(document, ensure_ascii=False)


def peer(
    uid: str,
    mode: str | None = None,
    *,
    selector: Mapping[str, str] | None = None,
    ports: Mapping[int, str] | None = None,
    created: str | None = None,
) -> str:
    """Return a PeerAuthentication."""
    spec: dict[str, Any] = {}
    if mode is not None:
        spec["mtls"] = {"mode": mode}
    if selector is not None:
        spec["selector"] = {"matchLabels": dict(selector)}
    if ports is not None:
        spec["portLevelMtls"] = {str(port): {"mode": value} for port, value in ports.items()}
    metadata = {} if created is None else {"creationTimestamp": created}
    return _document("security.istio.io/v1", "PeerAuthentication", uid, spec, metadata)


def authorization(
    uid: str,
    action: str | None = None,
    rules: Sequence[Any] | None = None,
    *,
    selector: Mapping[str, str] | None = None,
    annotations: Mapping[str, str] | None = None,
    created: str | None = None,
    **spec: Any,  # noqa: ANN401 - whatever a test puts into the spec
) -> str:
    """Return an AuthorizationPolicy."""
    full: dict[str, Any] = dict(spec)
    if selector is not None:
        full["selector"] = {"matchLabels": dict(selector)}
    if action is not None:
        full["action"] = action
    if rules is not None:
        full["rules"] = list(rules)
    metadata: dict[str, Any] = {} if created is None else {"creationTimestamp": created}
    if annotations is not None:
        metadata["annotations"] = dict(annotations)
    return _document("security.istio.io/v1", "AuthorizationPolicy", uid, full, metadata)


def identities(uid: str, *members: str) -> str:
    """Return an IdentitySet."""
    spec = {"identities": list(members)}
    return _document("nodeagent.io/v1alpha1", "IdentitySet", uid, spec, {})


def workload(
    uid: str,
    address: str,
    *,
    netns: str | None = None,
    addresses: str | None = None,
    labels: Mapping[str, str] | None = None,
    annotations: Mapping[str, str] | None = None,
    created: str | None = None,
    **spec: Any,  # noqa: ANN401 - whatever a test puts into the spec
) -> str:
    """Return a WorkloadEntry; `labels` are those of its metadata."""
    metadata: dict[str, Any] = {}
    found = dict(annotations or {})
    if netns is not None:
        found["nodeagent.io/netns"] = netns
    if addresses is not None:
        found["nodeagent.io/addresses"] = addresses
    if found:
        metadata["annotations"] = found
    if labels is not None:
        metadata["labels"] = dict(labels)
    if created is not None:
        metadata["creationTimestamp"] = created
    spec = {"address": address, **spec}
    return _document("networking.istio.io/v1", "WorkloadEntry", uid, spec, metadata)


def service(uid: str, *, created: str | None = None, **spec: Any) -> str:  # noqa: ANN401 - as above
    """Return a ServiceEntry with STATIC resolution, one host and port 80 unless said otherwise."""
    namespace, _, name = uid.rpartition("/")
    full: dict[str, Any] = {
        "hosts": [f"{name}.{namespace or 'default'}"],
        "ports": [{"number": 80, "name": "http"}],
        "resolution": "STATIC",
        **spec,
    }
    metadata = {} if created is None else {"creationTimestamp": created}
    return _document("networking.istio.io/v1", "ServiceEntry", uid, full, metadata)


def docs(*texts: str) -> bytes:
    """Return the documents as one file."""
    return "\n---\n".join(texts).encode()


def read(*texts: str, file: str = "mesh.yaml", node: str = "n1") -> tuple[Document, ...]:
    """Return the documents; an error in them fails the test."""
    loaded = load(docs(*texts), file, node)
    assert not loaded.errors, [str(error) for error in loaded.errors]
    return loaded.documents


def refuse(data: bytes | str, node: str = "n1") -> tuple[ConfigError, ...]:
    """Return the errors of a file; a file without one fails the test."""
    loaded = load(data.encode() if isinstance(data, str) else data, "bad.yaml", node)
    assert loaded.errors
    return loaded.errors
