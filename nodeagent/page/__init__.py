"""The web page of a node: its files, how they are served, and who may see it from elsewhere.

This package owns what is below `/ui/` and the access to it beyond loopback. It promises that the
page can read only, that nothing is fetched from anywhere else (a strict content security policy),
and that without a token nobody beyond loopback sees a name. It may not know where the answers that
the page shows come from.
"""

from nodeagent.page._access import AccessError, Gate, read_token, tls_context
from nodeagent.page._files import HOME, Files, add_routes, wants_page
from nodeagent.page._guard import behind

__all__ = [
    "HOME",
    "AccessError",
    "Files",
    "Gate",
    "add_routes",
    "behind",
    "read_token",
    "tls_context",
    "wants_page",
]
