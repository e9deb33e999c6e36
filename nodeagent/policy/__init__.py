"""Policy: which mutual TLS mode is in force for each workload and port, and who may call it.

This package owns the meaning of PeerAuthentication, AuthorizationPolicy, IdentitySet and the
annotation of callers. It promises one answer for one set of documents, whatever their order, with
the place of the document that decided each part; never UNSET, for inheritance is resolved here; and
that what cannot be resolved lets nobody in. It is pure, and knows nothing of nodes, sources or the
tunnel.
"""

from nodeagent.policy._authorization import Authorizations, Authorizer, LeftOut
from nodeagent.policy._evasion import Evasions
from nodeagent.policy._identity_sets import IdentitySets
from nodeagent.policy._peer_authentication import (
    DEFAULT_ORIGIN,
    Level,
    Resolution,
    level_of,
    origin_of,
    resolve,
)
from nodeagent.policy._subjects import Subject, Subjects
from nodeagent.policy._unenforced import Unenforced, unenforced

__all__ = [
    "DEFAULT_ORIGIN",
    "Authorizations",
    "Authorizer",
    "Evasions",
    "IdentitySets",
    "LeftOut",
    "Level",
    "Resolution",
    "Subject",
    "Subjects",
    "Unenforced",
    "level_of",
    "origin_of",
    "resolve",
    "unenforced",
]
