"""AuthorizationPolicy as the tunnel is told of it, on a small mesh.

Owns three workloads (`shop/web` and `data/db` on this node, `shop/far` on another), builders of
rules, and the question whether a compiled policy matches a caller. Promises that every policy it
returns is one that the tunnel takes.
"""

from __future__ import annotations

from typing import Any

from nodeagent import mesh
from nodeagent.mesh import MeshState
from nodeagent.settings import Settings
from support.resources import authorization, read, workload
from ztunnel.policy.conditions import facts
from ztunnel.policy.rules import cases, check
from ztunnel.protocol import Authorization
from ztunnel.spiffe import SpiffeId

__all__ = [
    "DB", "FAR", "NODE", "ROOT", "WEB", "A", "B", "build", "compiled", "matches", "policy",
    "sources",
]  # fmt: skip

ROOT = "istio-system"
NODE = Settings(node="n1", trust_domain="td")
WEB = workload("shop/web", "10.1.0.2", netns="web", labels={"app": "web"})
DB = workload("data/db", "10.1.0.3", netns="db", labels={"app": "db"})
FAR = workload("shop/far", "10.1.0.4", netns="n2:far", labels={"app": "far"})
A, B = "td/ns/shop/sa/a", "td/ns/shop/sa/b"


def build(*texts: str) -> MeshState:
    return mesh.build(read(WEB, DB, FAR, *texts), NODE)


def compiled(*texts: str, kind: str = "AuthorizationPolicy", uid: str = "shop/p") -> Authorization:
    found = build(*texts).authorizations[f"{kind}/{uid}"]
    check(found)
    return found


def sources(*found: dict[str, Any]) -> dict[str, Any]:
    return {"from": [{"source": each} for each in found]}


def policy(*rules: dict[str, Any], action: str = "ALLOW", **fields: Any) -> str:  # noqa: ANN401 - whatever the builder takes
    return authorization("shop/p", action, rules, **fields)


def matches(found: Authorization, identity: str, port: int = 80, source: str = "") -> bool:
    """Return whether a caller matches; `identity` without a scheme, "" for plaintext."""
    who = SpiffeId.parse(f"spiffe://{identity}") if identity else None
    packed = bytes(10) + b"\xff\xff" + bytes(map(int, (source or "10.9.0.1").split(".")))
    seen = facts(who, packed, bytes(10) + b"\xff\xff\x0a\x01\x00\x02", port)
    return any(case.holds(seen) for rule in found.rules for case in cases(rule))
