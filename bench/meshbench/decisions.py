"""Authorization in figures: what a decision costs, and a change, at 10 to 100,000 policies.

This module owns that one measurement, of one count in a process of its own: time of a decision on a
miss (p50, p99), time to compile all policies, time from a change of one policy to the state with
it, and the memory of the policies. Nothing runs beside what is measured, so the figures are those
of an idle node.

The policies all count for the one workload that is called: one in ten for the mesh, half for its
namespace, the others by selector. Each allows one caller that no other policy names, by principal,
account or namespace, on one of 50 ports; one in twenty denies an address range, one in fifty audits
whoever is not of some namespace.
"""

from __future__ import annotations

import gc
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from ztunnel import address
from ztunnel.authorize import Request, authorize
from ztunnel.protocol import (
    Action,
    Attribute,
    Authorization,
    Condition,
    DataPlane,
    Mode,
    Pod,
    Resource,
    Rule,
    TrustBundle,
    Workload,
    WorkloadPolicy,
)
from ztunnel.spiffe import SpiffeId
from ztunnel.state import EMPTY, Change, State, apply

__all__ = ["COUNTS", "measure"]

COUNTS: Final = (10, 1_000, 100_000)
DECISIONS: Final = 20_000
CHANGES: Final = 20
WORKLOADS: Final = 100_000
DOMAIN: Final = "cluster.local"
CALLED: Final = "shop/pay"
ADDRESS: Final = "10.200.0.1"


def _condition(number: int) -> Condition:
    match number % 3:
        case 0:
            return Condition(Attribute.PRINCIPAL, (f"{DOMAIN}/ns/n{number}/sa/a{number}",))
        case 1:
            return Condition(Attribute.SERVICE_ACCOUNT, (f"n{number}/a{number}",))
        case _:
            return Condition(Attribute.NAMESPACE, (f"n{number}",))


def policy(number: int, revision: int = 0) -> Authorization:
    """Return one policy of the set; another `revision` says the same on another port."""
    port = Condition(Attribute.DESTINATION_PORT, (str(8000 + (number + revision) % 50),))
    action = Action.ALLOW
    source: tuple[Condition, ...] = (_condition(number),)
    if not number % 20:
        action = Action.DENY
        network = f"172.{16 + number // 65536 % 16}.{number // 256 % 256}.{number % 256}"
        source = (Condition(Attribute.SOURCE_IP, (network,)),)
    elif not number % 50 - 1:
        action = Action.AUDIT
        source = (Condition(Attribute.NAMESPACE, (), ("shop", f"n{number}")),)
    name = f"shop/p{number:06}"
    return Authorization(
        f"AuthorizationPolicy/{name}",
        action,
        (Rule(f"{name} rules[0] (policies.yaml:{number})", (source,), ((port,),)),),
        f"{name} (policies.yaml:{number})",
        "" if not number % 10 else "shop",
        None if number % 10 < 6 else (CALLED,),
    )


def _workload(number: int) -> Workload:
    account = f"a{number}"
    uid = f"n{number}/w{number}"
    identity = f"spiffe://{DOMAIN}/ns/n{number}/sa/{account}"
    found = f"10.{number >> 16 & 127}.{number >> 8 & 255}.{number & 255}"
    return Workload(uid, uid, f"n{number}", account, DOMAIN, identity, (found,), DataPlane.HBONE)


def mesh() -> State:
    """Return a state with a called pod, WORKLOADS workloads, and no authorization."""
    parts: tuple[Resource, ...] = (
        *map(_workload, range(WORKLOADS)),
        WorkloadPolicy(CALLED, Mode.PERMISSIVE, "default"),
        TrustBundle(DOMAIN, (b"root",)),
        Pod("pod", CALLED, (ADDRESS,), 1),
    )
    return apply(EMPTY, Change(version=1, reset=True, upserts=parts))


def changed(found: State, *policies: Authorization) -> State:
    return apply(found, Change(version=found.version + 1, reset=False, upserts=policies))


def requests(found: State, count: int) -> list[Request]:
    """Return calls of callers that policies name, of others, and of some without identity."""
    pod, destination = found.pods["pod"], address.pack(ADDRESS)
    made: list[Request] = []
    for number in range(DECISIONS):
        caller = number * 7919 % (2 * count)
        identity = SpiffeId.workload(DOMAIN, f"n{caller}", f"a{caller}") if number % 10 else None
        source = address.pack(f"10.{number >> 8 & 255}.{number & 255}.1")
        made.append(Request(pod, identity, source, destination, 8000 + caller % 50))
    return made


def memory() -> int:
    """Return the bytes of this process in memory (proc(5), statm)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _row(count: int) -> dict[str, float]:
    """Measure one count in this process."""
    gc.disable()
    found = mesh()
    base = memory()
    policies = tuple(map(policy, range(count)))
    begin = time.perf_counter()
    found = changed(found, *policies)
    seconds = time.perf_counter() - begin
    held = memory() - base
    times: list[float] = []
    allowed = 0
    for request in requests(found, count):
        begin = time.perf_counter()
        verdict = authorize(found, request)
        times.append(time.perf_counter() - begin)
        allowed += verdict.allow
    times.sort()
    changes: list[float] = []
    for number in range(CHANGES):
        edited = policy(number * 31 % count, number + 1)
        begin = time.perf_counter()
        found = changed(found, edited)
        changes.append(time.perf_counter() - begin)
    changes.sort()
    return {
        "p50_us": times[len(times) // 2] * 1e6,
        "p99_us": times[len(times) * 99 // 100] * 1e6,
        "allowed_percent": 100 * allowed / len(times),
        "compiled_ms": seconds * 1e3,
        "change_ms": changes[CHANGES // 2] * 1e3,
        "bytes_each": held / count,
    }


def measure(count: int) -> dict[str, float]:
    """Measure `count` policies in a process of its own: none finds the memory of another."""
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(count)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        check=True,
        text=True,
    )
    values: dict[str, float] = json.loads(done.stdout)
    return values


if __name__ == "__main__":
    print(json.dumps(_row(int(sys.argv[1]))))
