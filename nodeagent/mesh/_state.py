"""The state of the mesh, as one immutable value.

This module owns the types that `build` returns. It promises values that compare equal when they
mean the same. It may not hold anything that is not derived from documents and settings.
"""

from __future__ import annotations

import msgspec

from nodeagent.api import ConfigError
from nodeagent.policy import LeftOut, Unenforced
from ztunnel.protocol import Authorization, Service, Workload, WorkloadPolicy

__all__ = ["Binding", "MeshState"]


class Binding(msgspec.Struct, frozen=True, order=True):
    """A workload of this node, and the network namespace that it runs in.

    `workload` is the workload's uid. `netns` is the name of a named namespace, or an absolute path.
    """

    workload: str
    netns: str


class MeshState(msgspec.Struct, frozen=True):
    """Everything that this node knows of the mesh; all keys are uids.

    `policies` are of this node's bound workloads, those of `bindings`, and of those of other nodes
    that are to be called in plaintext, unless the state was built for all of the mesh.
    `authorizations` are those that are for any bound workload; `left_out` are rules of these, by
    uid, that no tunnel is told. `problems` are references in documents in force that lead nowhere:
    what depends on them is closed. `unenforced` are policies that are not enforced as they are
    written. `warnings` name what has no effect or was decided in a conflict, with file and line.
    """

    workloads: dict[str, Workload] = {}
    services: dict[str, Service] = {}
    policies: dict[str, WorkloadPolicy] = {}
    authorizations: dict[str, Authorization] = {}
    left_out: dict[str, tuple[LeftOut, ...]] = {}
    bindings: dict[str, Binding] = {}
    problems: tuple[ConfigError, ...] = ()
    unenforced: tuple[Unenforced, ...] = ()
    warnings: tuple[str, ...] = ()
