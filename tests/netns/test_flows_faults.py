"""Recording while things go wrong: traffic goes on, and what was lost is known to be.

The promise that each test holds the daemons to: a connection is recorded, or lies in a gap that the
report tells of. Never neither.
"""

from __future__ import annotations

import errno
import json
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from nodeagent.flows import FILE_NAME
from nodeagent.lab import Lab
from support.e2e import Mesh, running, spec, watched
from support.netns import wait_until

Found = dict[str, Any]

NODE = "node-2"
"""Where `far` is."""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with running(spec(apps=False, pods=("client", "far"))) as made:
        yield made


@pytest.fixture
def mesh(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Mesh]:
    with watched(lab, request) as made:
        yield made


def recording(mesh: Mesh) -> Found:
    status, body = mesh.lab.node(NODE).get("/flows?seconds=3600", 15000)
    assert status == 200
    found: Found = json.loads(body)
    return found


def connections(mesh: Mesh, port: int) -> int:
    """Return how many connections to a port of `far` are recorded."""
    flows = recording(mesh)["flows"]
    return sum(
        flow["connections"] for flow in flows if (flow["port"], flow["reason"]) == (port, "")
    )


def gaps(mesh: Mesh, since: float) -> list[tuple[float, float, str]]:
    """Return the gaps that end after `since`."""
    found = [
        (
            datetime.fromisoformat(gap["begin"]).timestamp(),
            datetime.fromisoformat(gap["until"]).timestamp(),
            gap["cause"],
        )
        for gap in recording(mesh)["gaps"]
    ]
    return [gap for gap in found if gap[1] > since]


def beginning(mesh: Mesh, seconds: int = 2) -> float:
    """Return the time, once every gap that is known lies behind it: two seconds, so that the next
    one, to the second, is another one.
    """
    wait_until(
        lambda: all(gap[1] + seconds < time.time() for gap in gaps(mesh, 0)), "gaps are over"
    )
    return time.time()


def settled(mesh: Mesh) -> None:
    """Wait until nothing is missing now, and `far` is captured again."""
    wait_until(lambda: recording(mesh)["complete"] is not None, "recording goes on")
    wait_until(lambda: mesh.ready(NODE) and mesh.ready(NODE, "nodeagent"), "both daemons are ready")


def store(mesh: Mesh) -> Path:
    return mesh.lab.layout.node_directory(NODE) / "state" / FILE_NAME


def test_a_killed_ztunnel_loses_no_more_than_it_says(mesh: Mesh, lab: Lab) -> None:
    listener = mesh.listen("far")
    port: int = listener.getsockname()[1]
    before = beginning(mesh)
    for _ in range(3):
        mesh.visit("client", "far", listener=listener)
    wait_until(lambda: connections(mesh, port) == 3, "three are recorded")
    mesh.visit("client", "far", listener=listener)
    lab.node(NODE).kill("ztunnel")
    lab.node(NODE).restart("ztunnel")
    settled(mesh)
    again = time.time()
    for _ in range(2):
        mesh.visit("client", "far", listener=listener)
    # The one between may have been told in time, or not: then it lies in the gap.
    wait_until(lambda: connections(mesh, port) in {5, 6}, "what came later is recorded")
    ((begin, until, cause),) = gaps(mesh, before)
    assert cause == "ztunnel ended without its last report"
    # It ends when the next one had begun.
    assert begin <= until <= again + 1
    # What is answered from memory says so too.
    status, body = lab.node(NODE).get(f"/graph?seconds={int(time.time() - before) + 60}", 15000)
    assert (status, json.loads(body)["complete"]) == (200, False)


def test_a_ztunnel_that_is_gone_is_missed_at_once(mesh: Mesh, lab: Lab) -> None:
    """Not only after the silence of one whom nobody calls: its last callers are in no report."""
    settled(mesh)
    lab.node(NODE).kill("ztunnel")
    found = recording(mesh)
    assert (found["complete"], found["gaps"][-1]["cause"]) == (
        None,
        "nothing has been reported since",
    )
    lab.node(NODE).restart("ztunnel")
    settled(mesh)


def test_a_ztunnel_that_ends_in_good_order_leaves_no_gap(mesh: Mesh, lab: Lab) -> None:
    listener = mesh.listen("far")
    port: int = listener.getsockname()[1]
    # A window of what is in memory begins with its slice, which has five seconds.
    begun = beginning(mesh, 7)
    mesh.visit("client", "far", listener=listener)
    lab.node(NODE).restart("ztunnel")
    settled(mesh)
    mesh.visit("client", "far", listener=listener)
    wait_until(lambda: connections(mesh, port) == 2, "both are recorded")
    assert gaps(mesh, begun) == []
    status, body = lab.node(NODE).get(f"/graph?seconds={int(time.time() - begun)}", 15000)
    assert (status, json.loads(body)["complete"]) == (200, True)


def test_a_killed_nodeagent_costs_what_was_on_its_way_and_it_is_known(mesh: Mesh, lab: Lab) -> None:
    listener = mesh.listen("far")
    port: int = listener.getsockname()[1]
    mesh.visit("client", "far", listener=listener)
    wait_until(lambda: connections(mesh, port) == 1, "the first is recorded")
    since = wait_until(lambda: recording(mesh)["watched"].get("shop/far"), "it is watched")
    begun = beginning(mesh)
    lab.node(NODE).kill("nodeagent")
    # Nobody records now, and everybody is served.
    for _ in range(20):
        mesh.visit("client", "far", listener=listener)
    lab.node(NODE).restart("nodeagent")
    settled(mesh)
    mesh.visit("client", "far", listener=listener)

    def accounted() -> bool:
        known = connections(mesh, port)
        return known == 22 or (known < 22 and bool(gaps(mesh, begun)))

    wait_until(accounted, "all are recorded, or a gap is told of")
    assert all(until <= time.time() + 1 for _, until, _ in gaps(mesh, begun))
    # What is captured stayed captured: it was watched all the time.
    assert recording(mesh)["watched"] == {"shop/far": since}


@pytest.mark.parametrize("how", ["garbage", "removed"])
def test_a_store_that_is_broken_is_begun_anew_and_it_is_known(
    mesh: Mesh, lab: Lab, how: str
) -> None:
    listener = mesh.listen("far")
    port: int = listener.getsockname()[1]
    mesh.visit("client", "far", listener=listener)
    wait_until(lambda: connections(mesh, port) == 1, "the first is recorded")
    lab.node(NODE).stop("nodeagent")
    file = store(mesh)
    if how == "garbage":
        file.write_bytes(b"\x00no database\xff" * 4096)
    else:
        file.unlink()
    begun = time.time()
    mesh.visit("client", "far", listener=listener)
    lab.node(NODE).restart("nodeagent")
    settled(mesh)
    mesh.visit("client", "far", listener=listener)
    # Of the time before nothing is known, and nothing of it is claimed.
    wait_until(lambda: connections(mesh, port) >= 1, "what comes is recorded")
    assert connections(mesh, port) <= 2
    found = recording(mesh)
    assert found["problem"] == ""
    assert [gap["cause"] for gap in found["gaps"]] == ["nothing was recorded before"]
    ((_, until, _),) = gaps(mesh, 0)
    assert until >= begun - 1
    assert file.with_name(f"{FILE_NAME}.broken").exists() or how == "removed"


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_a_disk_that_takes_nothing_holds_no_traffic_up(mesh: Mesh, lab: Lab, how: str) -> None:
    listener = mesh.listen("far")
    port: int = listener.getsockname()[1]
    node, state = lab.node(NODE), store(mesh).parent
    node.stop("nodeagent")
    mount("-t", "tmpfs", "-o", "size=2m", "tmpfs", str(state))

    def undo() -> None:
        node.stop("nodeagent")
        subprocess.run(["umount", str(state)], check=True)
        node.restart("nodeagent")

    mesh.defer(undo)
    node.restart("nodeagent")
    settled(mesh)
    mesh.visit("client", "far", listener=listener)
    wait_until(lambda: connections(mesh, port) == 1, "the first is recorded")
    begun = beginning(mesh)
    if how == "full":
        fill(state / "ballast")
    else:
        # Nobody may have a file open for writing there; and a daemon must start on it, too.
        node.stop("nodeagent")
        mount("-o", "remount,ro", str(state))
        node.restart("nodeagent")
    for _ in range(5):
        mesh.visit("client", "far", listener=listener)
    trouble = wait_until(lambda: recording(mesh)["problem"], "it says that it cannot record")
    assert ("no room" if how == "full" else "Read-only") in trouble
    assert mesh.status(NODE)["recording"]["problem"] == trouble
    if how == "full":
        (state / "ballast").unlink()
    else:
        node.stop("nodeagent")
        mount("-o", "remount,rw", str(state))
    # It would try again within half a minute; a restart does at once.
    node.restart("nodeagent")
    settled(mesh)
    mesh.visit("client", "far", listener=listener)
    wait_until(lambda: connections(mesh, port) >= 2, "what comes is recorded again")
    if connections(mesh, port) < 7:
        assert gaps(mesh, begun)
    assert recording(mesh)["problem"] == ""


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def fill(file: Path) -> None:
    with file.open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(bytes(4096))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
