"""The mesh: documents become workloads, services, policies and bindings.

This package owns the meaning of a set of documents as a whole: `build` turns them into the state
that this node needs, a `Builder` does so for one set after another at the cost of what has changed,
and `diff` tells two states apart. It promises the same state for the same documents in any order;
that every conflict is settled in the same way everywhere and named in a warning; and that no
conflict gives one workload another's identity, or takes a workload of the mesh back to plaintext.
It is pure: values in, values out.
"""

from nodeagent.mesh._build import Builder, build
from nodeagent.mesh._diff import Resource, diff
from nodeagent.mesh._state import Binding, MeshState

__all__ = ["Binding", "Builder", "MeshState", "Resource", "build", "diff"]
