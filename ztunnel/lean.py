"""What the daemon's libraries would load and it never uses, left out before they are loaded.

This module owns that list. It promises that each library works as far as the daemon uses it, and
that anything else fails where it is used and not silently. It must be called before those libraries
are imported, and may import nothing of ours.

None in `sys.modules` is Python's way to say that a module is not there.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any, Final

__all__ = ["leave_out", "system_ssl"]

_NAMES: Final = ("PROTOCOL_TLS_CLIENT", "PROTOCOL_TLS_SERVER", "SSLContext", "TLSVersion")
"""What prometheus_client's own HTTP server and gateway client name when they are defined."""


def leave_out() -> None:
    """Leave out rich (three megabytes), the system's libssl (four) and its libcrypto (three).

    structlog imports rich where it is installed, for colours that the daemon never prints.
    asyncio imports ssl for streams that the daemon does not open: its TLS is the core's, by the
    OpenSSL of `cryptography`, and with this the only OpenSSL in the process. hashlib has digests
    of its own, and takes the system's only where it finds them. prometheus_client imports ssl for
    a server and a client that the daemon does not run; it alone cannot do without, and is given
    the names.
    """
    if "ssl" in sys.modules:
        return  # a test's process, or a debugger's
    sys.modules.setdefault("rich", None)  # type: ignore[arg-type]  # typeshed has modules only
    sys.modules["_hashlib"] = None  # type: ignore[assignment]  # as above
    sys.modules["ssl"] = None  # type: ignore[assignment]  # as above
    importlib.import_module("asyncio")
    named = ModuleType("ssl", "Names only: see ztunnel.lean.")
    for name in _NAMES:
        setattr(named, name, None)
    sys.modules["ssl"] = named
    importlib.import_module("prometheus_client")
    sys.modules["ssl"] = None  # type: ignore[assignment]  # as above


def system_ssl() -> Any:  # noqa: ANN401 - the module, whose types `leave_out` keeps from importers
    """Return the module ssl after all, for who sends spans by https: the system's OpenSSL beside
    the core's, seven megabytes.
    """
    if sys.modules.get("ssl") is None:
        sys.modules.pop("ssl", None)
    return importlib.import_module("ssl")
