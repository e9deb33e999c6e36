"""Recorded flows: who has called the workloads of this node, kept on disk for some days.

This package owns the file `flows.db` in the state directory. It promises that recording never holds
up anything (a thread of its own, a bounded queue), that the file is bounded in age and size, that a
crash loses no more than what had not been reported, that whoever reads knows from when to when
nothing is missing, and that a file which cannot be read is put aside and not in the way. It may not
judge: what it keeps are ztunnel's own verdicts.
"""

from nodeagent.flows._errors import StoreError
from nodeagent.flows._model import SCHEMA, Gap, Recorded, Recording
from nodeagent.flows._reading import read, recording
from nodeagent.flows._recorder import Recorder, RecorderStatus
from nodeagent.flows._store import FILE_NAME, FlowStore

__all__ = [
    "FILE_NAME",
    "SCHEMA",
    "FlowStore",
    "Gap",
    "Recorded",
    "Recorder",
    "RecorderStatus",
    "Recording",
    "StoreError",
    "read",
    "recording",
]
