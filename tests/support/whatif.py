"""A small mesh as documents, and the evaluator of any change of it: for questions of "what if".

Owns builders with defaults: a test names only what matters to it.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from nodeagent import api
from nodeagent.flows import Recorded
from nodeagent.offline import Offline
from nodeagent.settings import Settings

DOMAIN = "cluster.local"
WORKLOADS = {"shop/web": 2, "shop/pay": 3, "ops/probe": 4}


def entry(uid: str, last: int, *, mesh: bool = True, account: str = "") -> str:
    namespace, name = uid.split("/")
    annotations = f"{{nodeagent.io/netns: {name}}}" if mesh else "{}"
    return f"""
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {{name: {name}, namespace: {namespace}, annotations: {annotations}}}
spec: {{address: 10.1.0.{last}, serviceAccount: {account or name}, labels: {{app: {name}}}}}
"""


def mesh(**changes: str) -> list[str]:
    """Return the workloads; `changes` are others' documents by name ("" leaves one out)."""
    found = {uid.split("/")[1]: entry(uid, last) for uid, last in WORKLOADS.items()} | changes
    return [document for document in found.values() if document]


def strict(namespace: str = "istio-system", mode: str = "STRICT", spec: str = "") -> str:
    return f"""
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {{name: strict, namespace: {namespace}}}
spec: {{mtls: {{mode: {mode}}}{spec}}}
"""


def policy(rules: str, action: str = "ALLOW", name: str = "callers", app: str = "pay") -> str:
    return f"""
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: {name}, namespace: shop}}
spec: {{action: {action}, selector: {{matchLabels: {{app: {app}}}}}, rules: {rules}}}
"""


def configuration(*documents: str, settings: Settings | None = None) -> Offline:
    text = "---\n".join(documents).encode()
    found = api.load(text, "mesh.yaml", "n1")
    assert not found.errors, [str(error) for error in found.errors]
    return Offline.of(found.documents, settings or Settings(node="n1"))


def flow(first: datetime, last: datetime, **changes: Any) -> Recorded:  # noqa: ANN401 - its fields
    """Return a recorded caller: shop/web to shop/pay, by mutual TLS, let in."""
    values: dict[str, Any] = {
        "identity": web(),
        "source": "10.1.0.2",
        "workload": "shop/web",
        "arrival": "hbone",
        "destination": "shop/pay",
        "address": "10.1.0.3",
        "port": 8080,
        "allowed": True,
        "reason": "",
        "first": first,
        "last": last,
        "connections": 1,
        "most_open": 1,
        "received": 1,
        "sent": 1,
    }
    return Recorded(**(values | changes))


def web(account: str = "web", namespace: str = "shop") -> str:
    return f"spiffe://{DOMAIN}/ns/{namespace}/sa/{account}"


ONLY_WEB = '[{from: [{source: {principals: ["cluster.local/ns/shop/sa/web"]}}]}]'
