"""What the agent would decide, asked without an agent.

This package owns the way from documents to verdicts outside the daemons: the reading of files that
somebody names, the judgement of any connection to any workload of a configuration, and why. It
promises that the way is the daemons' own, module by module (`api`, `mesh`, then ztunnel's state and
its `authorize`), so that what is answered here is what would happen there; and that a configuration
which an agent would refuse is not judged by. It may not change or contact anything.

`_documents` reads files, and it alone; `_offline` judges, `_ask` turns names into questions,
`_explain` says why, `_table` compares with what was expected.
"""

from nodeagent.offline._ask import (
    PLAINTEXT,
    Caller,
    QuestionError,
    Target,
    address_of,
    caller,
    proves_identity,
    split_port,
    targets,
)
from nodeagent.offline._documents import STDIN, Documents, NoFilesError, read, read_file
from nodeagent.offline._explain import (
    EXPLAIN_SCHEMA,
    Answer,
    Explanation,
    MissReport,
    PassedOverReport,
    Place,
    RuleReport,
    UnreadReport,
    explain,
)
from nodeagent.offline._offline import (
    OWN_PORTS,
    Group,
    ModeInForce,
    Offline,
    UnusableError,
    Verdict,
    pack,
)
from nodeagent.offline._table import Case, Outcome, Result, Table, read_table, run_case

__all__ = [
    "EXPLAIN_SCHEMA",
    "OWN_PORTS",
    "PLAINTEXT",
    "STDIN",
    "Answer",
    "Caller",
    "Case",
    "Documents",
    "Explanation",
    "Group",
    "MissReport",
    "ModeInForce",
    "NoFilesError",
    "Offline",
    "Outcome",
    "PassedOverReport",
    "Place",
    "QuestionError",
    "Result",
    "RuleReport",
    "Table",
    "Target",
    "UnreadReport",
    "UnusableError",
    "Verdict",
    "address_of",
    "caller",
    "explain",
    "pack",
    "proves_identity",
    "read",
    "read_file",
    "read_table",
    "run_case",
    "split_port",
    "targets",
]
