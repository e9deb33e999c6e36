"""A small mesh in the seam's own types, for tests of ztunnel's judgement.

Owns builders with defaults: a test names only what matters to it.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from ztunnel import address
from ztunnel.protocol import (
    Action,
    Attribute,
    Authorization,
    Condition,
    DataPlane,
    Endpoint,
    Mode,
    Pod,
    Removal,
    Resource,
    Rule,
    Service,
    ServicePort,
    Settings,
    TrustBundle,
    Workload,
    WorkloadPolicy,
)
from ztunnel.state import EMPTY, Change, LocalPod, State, apply

DOMAIN: Final = "cluster.local"
SETTINGS: Final = Settings("node-1", "Kubernetes", DOMAIN, "eu/eu-1/a")


def identity(account: str, namespace: str = "default") -> str:
    return f"spiffe://{DOMAIN}/ns/{namespace}/sa/{account}"


def workload(
    name: str,
    *addresses: str,
    plane: DataPlane = DataPlane.HBONE,
    account: str = "",
    namespace: str = "default",
    locality: str = "",
    healthy: bool = True,
    app: str = "",
) -> Workload:
    account = account or name
    return Workload(
        uid=f"{namespace}/{name}",
        name=name,
        namespace=namespace,
        service_account=account,
        trust_domain=DOMAIN,
        identity=identity(account, namespace) if plane is DataPlane.HBONE else "",
        addresses=addresses,
        data_plane=plane,
        cluster="Kubernetes",
        locality=locality,
        canonical_service=app or name,
        canonical_revision="v1",
        app=app or name,
        version="v1",
        healthy=healthy,
    )


def service(
    name: str,
    vips: tuple[str, ...],
    endpoints: tuple[Endpoint, ...],
    *,
    ports: tuple[tuple[int, int], ...] = ((80, 8080),),
    namespace: str = "default",
) -> Service:
    hostname = f"{name}.{namespace}.svc.cluster.local"
    return Service(
        uid=f"{namespace}/{hostname}",
        hostname=hostname,
        namespace=namespace,
        addresses=vips,
        ports=tuple(ServicePort(number, target) for number, target in ports),
        endpoints=endpoints,
    )


def policy(uid: str, mode: Mode = Mode.PERMISSIVE, **ports: Mode) -> WorkloadPolicy:
    """`ports` are p80=Mode.STRICT and the like."""
    modes = {int(name[1:]): each for name, each in ports.items()}
    origins = dict.fromkeys(modes, f"{uid}-ports")
    return WorkloadPolicy(uid, mode, "istio-system/default", modes, origins)


def principals(*values: str) -> Condition:
    return Condition(Attribute.PRINCIPAL, values)


def ports(*values: int) -> Condition:
    return Condition(Attribute.DESTINATION_PORT, tuple(map(str, values)))


def authorization(
    name: str,
    action: Action = Action.ALLOW,
    *rules: Rule,
    workloads: tuple[str, ...] | None = None,
    dry_run: bool = False,
) -> Authorization:
    """`name` is "namespace/name"; of the whole mesh if the namespace is istio-system."""
    namespace = name.partition("/")[0]
    return Authorization(
        f"AuthorizationPolicy/{name}",
        action,
        tuple(
            msgspec.structs.replace(rule, origin=f"{name} rules[{number}] (policy.yaml:1)")
            for number, rule in enumerate(rules)
        ),
        f"{name} (policy.yaml:1)",
        "" if namespace == "istio-system" else namespace,
        workloads,
        dry_run,
    )


def source(*conditions: Condition, **fields: Any) -> Rule:  # noqa: ANN401 - the rule's
    """Return a rule with one source of these conditions; its origin comes with its policy."""
    return Rule("", sources=(conditions,) if conditions else (), **fields)


def pod(uid: str, workload_uid: str, *addresses: str, cookie: int = 1) -> Pod:
    return Pod(uid, workload_uid, addresses, cookie)


def bundle(*roots: bytes, domain: str = DOMAIN) -> TrustBundle:
    return TrustBundle(domain, roots)


def state(*resources: Resource, before: State = EMPTY, reset: bool = True) -> State:
    return apply(before, Change(before.version + 1, reset, resources, (), SETTINGS))


def change(
    version: int,
    *resources: Resource,
    removals: tuple[Removal, ...] = (),
    reset: bool = False,
    settings: Settings = SETTINGS,
) -> Change:
    return Change(version, reset, resources, removals, settings if reset else None)


def local(found: State, uid: str) -> LocalPod:
    return found.pods[uid]


def ip(text: str) -> bytes:
    return address.pack(text)
