"""A mesh of 100,000 workloads and 10,000 policies, as files.

This module owns what is in them: 1,000 namespaces of 100 workloads each, all of other nodes; and in
their namespaces most of the policies. One in ten counts for the workload that is called, one in
a hundred for the mesh. None of them lets in, or keeps out, the callers of a lab.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

__all__ = ["NAMESPACES", "POLICIES", "WORKLOADS", "edited", "files"]

WORKLOADS: Final = 100_000
POLICIES: Final = 10_000
NAMESPACES: Final = 1_000

A_FILE: Final = 250
"""Workloads of one file: 400 files of 70 KB."""
POLICIES_A_FILE: Final = 25
"""400 files of them: with the workloads' fewer than a directory may hold."""

_WORKLOAD: Final = """\
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata:
  name: w{number}
  namespace: n{namespace}
  labels: {{app: a{app}, version: v1, networking.istio.io/tunnel: http}}
spec: {{address: 10.{high}.{middle}.{low}, serviceAccount: a{app}}}
"""

_POLICY: Final = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: p{number}, namespace: {namespace}}}
spec:
  selector: {selector}
  action: DENY
  rules:
  - from:
    - source:
        principals: [cluster.local/ns/n{other}/sa/a{app}]
    to:
    - operation: {{ports: ["{port}"]}}
"""

_OPEN: Final = "{matchLabels: {app: a%d}}"


def _workload(number: int) -> str:
    return _WORKLOAD.format(
        number=number,
        namespace=number % NAMESPACES,
        app=number // NAMESPACES % 10,
        high=128 + (number >> 16),
        middle=number >> 8 & 255,
        low=number & 255,
    )


def _policy(number: int, *, revision: int = 0) -> str:
    selector, namespace = _OPEN % (number % 10), f"n{number % NAMESPACES}"
    if not number % 10:
        selector, namespace = "null", "default" if number % 100 else "istio-system"
    text = _POLICY.format(
        number=number,
        namespace=namespace,
        selector=selector,
        other=number * 7 % NAMESPACES,
        app=number % 10,
        port=20_000 + (number + revision) % 1000,
    )
    return text.replace("  selector: null\n", "")


def files() -> Iterator[tuple[str, str]]:
    """Yield the name and the text of each file."""
    for first in range(0, WORKLOADS, A_FILE):
        texts = map(_workload, range(first, min(first + A_FILE, WORKLOADS)))
        yield f"workloads-{first:06}.yaml", "---\n".join(texts)
    for first in range(0, POLICIES, POLICIES_A_FILE):
        yield edited(first, 0)


def edited(first: int, revision: int) -> tuple[str, str]:
    """Return the file of policies from `first` on; each revision says something else in one."""
    numbers = range(first, min(first + POLICIES_A_FILE, POLICIES))
    texts = (_policy(number, revision=revision if number == first else 0) for number in numbers)
    return f"policies-{first:06}.yaml", "---\n".join(texts)
