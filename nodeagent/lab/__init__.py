"""The lab: nodes, pods and a network as namespaces on one machine.

This package owns labs. It promises that what one lab makes is found under one directory and gone
after `down`, whatever happened in between, and that nothing outside is touched: not the machine's
network, not its names, not another lab. It runs the two daemons as anybody would, by their commands
and settings files, and imports nothing of them but the configuration language.

`Lab` is for tests and benchmarks, `nodeagent lab` for people. Names are loaded when first used: the
exercises' programs live in this package too, and stay small.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from nodeagent.lab.lab import Lab, LabNode
    from nodeagent.lab.model import App, LabSpec, Node, Pod, Port, Service
    from nodeagent.lab.names import UnknownPodError
    from nodeagent.lab.spec import exercises, load, load_exercise
    from nodeagent.lab.store import LabError, NoSuchLabError

__all__ = [
    "App",
    "Lab",
    "LabError",
    "LabNode",
    "LabSpec",
    "NoSuchLabError",
    "Node",
    "Pod",
    "Port",
    "Service",
    "UnknownPodError",
    "exercises",
    "load",
    "load_exercise",
]

_HOMES: Final = {
    "lab": ("Lab", "LabNode"),
    "model": ("App", "LabSpec", "Node", "Pod", "Port", "Service"),
    "names": ("UnknownPodError",),
    "spec": ("exercises", "load", "load_exercise"),
    "store": ("LabError", "NoSuchLabError"),
}


def __getattr__(name: str) -> object:
    for home, names in _HOMES.items():
        if name in names:
            found: object = getattr(importlib.import_module(f"nodeagent.lab.{home}"), name)
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
