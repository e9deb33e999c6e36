"""What would a change of configuration do: to calls in general, and to those that were made.

This package owns the comparison of two configurations by their verdicts. It promises that every
verdict is that of `offline`, and so of the tunnel; that the work and the answer are bounded, and
that the answer says what was not looked at; and that what cannot be told counts as a change for the
worse. It is pure: values in, values out.

`_places` finds the workloads that are judged by something else, `_callers` who could tell the
difference, `_compare` asks for them, and `_replay` asks for recorded flows.
"""

from nodeagent.whatif._compare import compare
from nodeagent.whatif._model import (
    DIFF_SCHEMA,
    CallChange,
    Comparison,
    DiffReport,
    FlowChange,
    ModeChange,
    Replay,
    Side,
)
from nodeagent.whatif._replay import POLICY_REASONS, domains, judge, replay

__all__ = [
    "DIFF_SCHEMA",
    "POLICY_REASONS",
    "CallChange",
    "Comparison",
    "DiffReport",
    "FlowChange",
    "ModeChange",
    "Replay",
    "Side",
    "compare",
    "domains",
    "judge",
    "replay",
]
