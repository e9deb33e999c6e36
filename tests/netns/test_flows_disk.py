"""Recording on a disk that is really full: traffic's part returns at once, and it goes on later."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.netns

CHILD = """
import itertools, json, sys, time
sys.path[:0] = {path!r}
from pathlib import Path
from nodeagent.settings.flows import Keep
from nodeagent.flows import Recorder, read
from nodeagent.flows import _recorder
from support.netns import wait_until
from ztunnel.protocol import Arrival, Flow, FlowKey, Flows

_recorder.RETRY_SECONDS = 0
here, ballast = Path({folder!r}) / "flows.db", Path({folder!r}) / "ballast"
numbers, began = itertools.count(1), int(time.time())
recorder = Recorder(here, Keep(), time.time, time.monotonic)

def put(count, destination):
    now = int(time.time())
    key = lambda n: FlowKey("", f"10.0.{{n // 250}}.{{n % 250}}", "", Arrival.HBONE, destination,
                            "10.1.0.1", 80, True)
    before = recorder.status
    flows = tuple(Flow(key(n), now, now, 1, 0, 0, 0) for n in range(count))
    recorder.put(1, Flows(flows, next(numbers), began, now))
    wait_until(lambda: recorder.status.recorded + recorder.status.lost
               == before.recorded + before.lost + count, "the batch is dealt with")
    return recorder.status.problem

recorder.start()
said = {{"first": put(10, "a/b")}}
with ballast.open("wb", buffering=0) as stream:
    try:
        while True:
            stream.write(bytes(4096))
    except OSError as error:
        said["disk"] = error.strerror
said["full"] = put(1500, "a/c")
said["still"] = put(1500, "a/c")
ballast.unlink()
said["again"] = put(10, "a/b")
recorder.stop(20)
found, _ = read(here, 0)
said["kept"] = {{
    destination: sum(flow.connections for flow in found if flow.destination == destination)
    for destination in ("a/b", "a/c")
}}
print(json.dumps(said))
"""


def test_a_full_disk_costs_what_was_reported_meanwhile_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    code = CHILD.format(path=sys.path, folder=str(folder))
    # A mount namespace of its own: nothing of it is left, whatever happens.
    mount = f"mount -t tmpfs -o size=512k tmpfs {folder} && exec '{sys.executable}' -"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", mount],
        input=code,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *log, last = done.stdout.splitlines()
    said = json.loads(last)
    assert said["first"] == ""
    assert said["disk"] == "No space left on device"
    assert "no room: the disk is full" in said["full"]
    assert "no room: the disk is full" in said["still"]
    assert said["again"] == ""
    # What was there is there, each lost batch is lost whole.
    assert said["kept"] == {"a/b": 20, "a/c": 0}
    text = "\n".join(log)
    assert text.count("flows are not recorded; traffic is not concerned") == 1
    assert text.count("flows are recorded again") == 1
