"""`nodeagent doctor`: what is wrong with this node, why, and what to do.

This package owns the look at a node from the outside of its daemons (`gather`), the judgement of
what was seen (`judge`) and the catalogue of findings (`codes`, docs/doctor.md). It promises to
change nothing, and to work while the daemons do not: that is when it is needed.
"""

from nodeagent.doctor.facts import Agent
from nodeagent.doctor.gather import Asked, gather
from nodeagent.doctor.judge import judge
from nodeagent.doctor.model import SCHEMA, Finding, Report, Severity

__all__ = ["SCHEMA", "Agent", "Asked", "Finding", "Report", "Severity", "gather", "judge"]
