"""The audit log beside systemd's own journald, in a mount namespace that ends with the test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from support.mesh_state import identity
from support.netns import DEADLINE

pytestmark = pytest.mark.netns

TESTS: Final = Path(__file__).parents[1]
JOURNALD: Final = "/lib/systemd/systemd-journald"

SAID: Final = """
import time, msgspec
from support.audit_lines import REFUSED, entry
from ztunnel.audit.outlets import Outlets
from ztunnel.policy import Match
from ztunnel.settings import AuditSettings
outlets = Outlets(time.time, None, None)
outlets.configure(AuditSettings(journal="/run/systemd/journal/socket"), "node-1")
audits = (Match("one\\nAUDIT_VERDICT=AUTHORIZED"), Match("two"))
outlets.give(entry(msgspec.structs.replace(REFUSED, audits=audits)))
outlets.stop(10, time.monotonic)
assert outlets.written == {"journal": 1}, outlets.lost
"""

SCRIPT: Final = """
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/journal /run/log
"$1" >/run/journald.log 2>&1 &
for _ in $(seq 200); do [ -S /run/systemd/journal/socket ] && break; sleep 0.05; done
"$2" -c "$3"
for _ in $(seq 200); do
    found=$(journalctl --directory /run/log/journal --output json AUDIT_VERDICT=UNAUTHORIZED)
    [ -n "$found" ] && break
    sleep 0.05
done
printf "%s\\n" "$found"
"""
"""All that it starts ends with it, which is the first process of its namespace."""


def test_journald_has_each_field_and_none_is_forged() -> None:
    assert Path(JOURNALD).exists(), "systemd is missing: run `make setup`"
    done = subprocess.run(
        [
            *("unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"),
            *("sh", "-c", SCRIPT, "sh", JOURNALD, sys.executable, SAID),
        ],
        env={**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}"},
        capture_output=True,
        text=True,
        timeout=DEADLINE * 4,
        check=False,
    )
    (line,) = done.stdout.splitlines() or [done.stderr]
    found = json.loads(line)
    assert found["MESSAGE"] == f'SPIFFE "{identity("sleep")}" UNAUTHORIZED policy=default'
    assert (found["PRIORITY"], found["SYSLOG_FACILITY"]) == ("4", "10")
    assert (found["_TRANSPORT"], found["SYSLOG_IDENTIFIER"]) == ("journal", "ztunnel")
    assert found["AUDIT_VERDICT"] == "UNAUTHORIZED"
    assert found["AUDIT_RULES"] == ["one\nAUDIT_VERDICT=AUTHORIZED", "two"]
    assert found["AUDIT_SRC_ADDR"] == "10.1.0.1:4000"
