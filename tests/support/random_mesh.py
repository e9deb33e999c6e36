"""Documents at random, from so small a world that they fight over names, addresses and labels.

Owns the world: three namespaces (one of them the root), a few names of each kind. The same `Random`
gives the same sequence. Every document is one that the loader takes.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any, Final

from support.resources import authorization, identities, peer, service, workload

ROOT: Final = "istio-system"
NAMESPACES: Final = ("shop", "data", ROOT)
CREATED: Final = (None, None, "2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z")
LABELS: Final[tuple[dict[str, str], ...]] = (
    {"app": "web"},
    {"app": "db"},
    {"app": "web", "tier": "front"},
    {"tier": "front"},
    {"app": "web", "istio.io/dataplane-mode": "none"},
    {"networking.istio.io/tunnel": "http"},
)
SELECTORS: Final[tuple[dict[str, str] | None, ...]] = (
    None, {"app": "web"}, {"app": "db"}, {"tier": "front", "app": "web"},
)  # fmt: skip
ADDRESSES: Final = ("10.1.0.2", "10.1.0.3", "10.1.0.4", "fd00::2", "192.0.2.1", "10.9.0.9")
NETNS: Final = (None, "a", "b", "c", "n2:a", "n1:/run/netns/b")
PRINCIPALS: Final = (
    "*", "td/ns/shop/sa/a", "td/ns/data/*", "*/sa/b", "set:s", "set:t", "set:data/u", "set:none",
)  # fmt: skip
PORTS: Final = ("80", "443")


def _uid(random: Random, names: str) -> str:
    return f"{random.choice(NAMESPACES)}/{random.choice(names)}"


def _workload(random: Random) -> str:
    netns = random.choice(NETNS)
    annotations = {}
    if not random.randrange(3):
        annotations["nodeagent.io/callers"] = random.choice(
            ("td/ns/shop/sa/a", "set:s", "set:data/u, td/ns/data/*")
        )
    addresses = random.sample(ADDRESSES, random.randint(1, 2))
    return workload(
        _uid(random, "vwxyz"),
        addresses[0],
        netns=netns,
        addresses=addresses[1] if len(addresses) > 1 else None,
        labels=random.choice(LABELS),
        annotations=annotations,
        created=random.choice(CREATED),
    )


def _peer(random: Random) -> str:
    selector = random.choice(SELECTORS)
    return peer(
        _uid(random, "pq"),
        random.choice((None, "STRICT", "PERMISSIVE", "DISABLE", "UNSET")),
        selector=selector,
        ports={80: "STRICT"} if selector and random.randrange(2) else None,
        created=random.choice(CREATED),
    )


def _rule(random: Random) -> dict[str, Any]:
    rule: dict[str, Any] = {}
    if random.randrange(4):
        principals = random.sample(PRINCIPALS, random.randint(1, 2))
        key = random.choice(("principals", "principals", "notPrincipals"))
        rule["from"] = [{"source": {key: principals}}]
    if random.randrange(2):
        operation: dict[str, Any] = {"ports": [random.choice(PORTS)]}
        if not random.randrange(4):
            operation["methods"] = ["GET"]
        rule["to"] = [{"operation": operation}]
    return rule


def _authorization(random: Random) -> str:
    action = random.choice(("ALLOW", "DENY", "AUDIT"))
    annotations = {"istio.io/dry-run": "true"} if not random.randrange(5) else None
    return authorization(
        _uid(random, "mno"),
        action,
        [_rule(random) for _ in range(random.randint(1, 2))],
        selector=random.choice(SELECTORS),
        annotations=annotations,
        created=random.choice(CREATED),
    )


def _identities(random: Random) -> str:
    # In a circle at times: s, t and u may all refer to one another.
    uid = random.choice(("shop/s", "shop/t", "data/u"))
    references = [f"set:{each}" for each in ("shop/s", "shop/t", "data/u") if each != uid]
    members = random.sample(("td/ns/shop/sa/a", "td/ns/data/sa/b", *references), 2)
    return identities(uid, *members)


def _service(random: Random) -> str:
    uid = _uid(random, "ij")
    spec: dict[str, Any] = {"addresses": random.sample(ADDRESSES, random.randint(0, 2))}
    if random.randrange(3):
        spec["workloadSelector"] = {"labels": random.choice(SELECTORS) or {"app": "web"}}
    else:
        spec["endpoints"] = [{"address": random.choice(ADDRESSES)}]
    if not random.randrange(4):
        spec["hosts"] = ["shared.test"]
    return service(uid, created=random.choice(CREATED), **spec)


_KINDS: Final[tuple[Callable[[Random], str], ...]] = (
    _workload, _workload, _workload, _peer, _authorization, _authorization, _identities, _service,
)  # fmt: skip


def document(random: Random) -> str:
    """Return the text of one document."""
    return random.choice(_KINDS)(random)
