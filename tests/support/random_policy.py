"""Policies and connections at random, from so small a world that they often meet.

Owns the world: a few trust domains, namespaces, accounts, addresses and ports, near misses among
them. The same `Random` gives the same sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Final

from support.naive_policy import Call
from ztunnel.protocol import Action, Attribute, Authorization, Condition, Rule

DOMAINS: Final = ("cluster.local", "cluster.local.evil", "other.test")
NAMESPACES: Final = ("shop", "shop-test", "prod")
ACCOUNTS: Final = ("till", "admin", "ill")
PRINCIPALS: Final = (
    *(f"{d}/ns/{n}/sa/{a}" for d in DOMAINS for n in NAMESPACES for a in ACCOUNTS),
    "cluster.local/build/runner",
    "cluster.local",
)
SOURCES: Final = ("10.0.0.1", "10.0.0.2", "10.1.0.1", "192.0.2.1", "fd00::1", "fd01::1", "::1:2")
DESTINATIONS: Final = ("10.2.0.1", "fd00:2::1")
NETWORKS: Final = (
    *("0.0.0.0/0", "10.0.0.0/8", "10.0.0.0/31", "10.0.0.1", "10.1.2.3/16", "192.0.2.1/32"),
    *("::/0", "::/64", "fd00::/8", "fd00::/16", "fd01::1", "10.2.0.0/16", "fd00:2::/32"),
)
PORTS: Final = (80, 443, 8080)
WORKLOADS: Final = ("shop/pay", "shop/cart", "prod/pay")


def call(random: Random) -> Call:
    return Call(
        random.choice((*PRINCIPALS, "", "", "")),
        random.choice(SOURCES),
        random.choice(DESTINATIONS),
        random.choice(PORTS),
        random.choice(WORKLOADS),
    )


def _text(values: tuple[str, ...]) -> Callable[[Random], str]:
    def pattern(random: Random) -> str:
        value = random.choice(values)
        cut = random.randrange(1, len(value))
        return random.choice((value, value, f"{value[:cut]}*", f"*{value[cut:]}", "*"))

    return pattern


_PATTERNS: Final[dict[Attribute, Callable[[Random], str]]] = {
    Attribute.PRINCIPAL: _text(PRINCIPALS),
    Attribute.NAMESPACE: _text(NAMESPACES),
    Attribute.SERVICE_ACCOUNT: _text(tuple(f"{n}/{a}" for n in NAMESPACES for a in ACCOUNTS)),
    Attribute.SOURCE_IP: lambda random: random.choice(NETWORKS),
    Attribute.DESTINATION_IP: lambda random: random.choice(NETWORKS),
    Attribute.DESTINATION_PORT: lambda random: str(random.choice(PORTS)),
}


def _condition(random: Random, attribute: Attribute) -> Condition:
    def patterns(most: int) -> tuple[str, ...]:
        return tuple(_PATTERNS[attribute](random) for _ in range(random.choice(range(1, most + 1))))

    match random.randrange(6):
        case 0:
            return Condition(attribute, (), patterns(2))
        case 1:
            return Condition(attribute, patterns(3), patterns(2))
        case _:
            return Condition(attribute, patterns(3))


def _conditions(random: Random, attributes: tuple[Attribute, ...], most: int) -> list[Condition]:
    chosen = random.sample(attributes, random.randint(1, min(most, len(attributes))))
    return [_condition(random, attribute) for attribute in chosen]


_SOURCE: Final = (
    Attribute.PRINCIPAL,
    Attribute.NAMESPACE,
    Attribute.SERVICE_ACCOUNT,
    Attribute.SOURCE_IP,
)
_OPERATION: Final = (Attribute.DESTINATION_PORT,)


def rule(random: Random, origin: str) -> Rule:
    def alternatives(attributes: tuple[Attribute, ...]) -> tuple[tuple[Condition, ...], ...]:
        count = random.choice((0, 1, 1, 2, 3))
        return tuple(tuple(_conditions(random, attributes, 2)) for _ in range(count))

    conditions = _conditions(random, tuple(Attribute), 2) if not random.randrange(3) else []
    return Rule(origin, alternatives(_SOURCE), alternatives(_OPERATION), tuple(conditions))


def policy(
    random: Random, name: str, action: Action | None = None, *, dry_run: bool | None = None
) -> Authorization:
    """Return a policy of some scope; `action` and `dry_run` at random unless given."""
    namespace = random.choice(("", "shop", "shop", "prod"))
    inside = tuple(uid for uid in WORKLOADS if uid.startswith(f"{namespace}/") or not namespace)
    selected = random.sample(inside, random.randint(0, len(inside)))
    origin = f"{namespace or 'istio-system'}/{name}"
    return Authorization(
        f"AuthorizationPolicy/{origin}",
        action or random.choice(tuple(Action)),
        tuple(rule(random, f"{origin} rules[{number}]") for number in range(random.randint(0, 3))),
        origin,
        namespace,
        tuple(selected) if random.randrange(2) else None,
        not random.randrange(5) if dry_run is None else dry_run,
    )
