"""`nodeagent trace`: the kernel's view of the pods' connections, on demand.

This package owns a program that bcc compiles when it is asked for, and what its events mean. It
promises to be a mere look, bounded by whoever calls, that leaves nothing behind; and that where it
cannot begin it says what is missing and how to get it. Nothing of it is loaded by the daemons.
"""

from nodeagent.trace._bcc import MissingError, Program
from nodeagent.trace._events import SCHEMA, Directory, Event, TracedPod, decode

__all__ = ["SCHEMA", "Directory", "Event", "MissingError", "Program", "TracedPod", "decode"]
