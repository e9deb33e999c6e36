"""The C core's plaintext relay, alone: copied and spliced bytes, urgent ones among them."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable

import pytest

from support.corelab import DECISION, SERIES, Judged, outbound_rule, pair
from support.netns import DEADLINE
from ztunnel import _core

pytestmark = pytest.mark.netns

LARGE = 3 << 20
"""Beyond what is copied, and beyond what the sockets on the way hold."""


def forward_rule(judged: Judged, upcall: _core.Upcall) -> None:
    """Forward everything to where it wanted to go."""
    number = DECISION + upcall.id
    judged.core.decide_forward(number, SERIES, b"", 0)
    judged.core.answer(upcall.id, upcall.epoch, number)


Rule = Callable[[Judged, _core.Upcall], None]
PATHS = pytest.mark.parametrize("rule", [forward_rule, outbound_rule], ids=["plain", "hbone"])


@PATHS
@pytest.mark.parametrize("before", [3, LARGE], ids=["small", "large"])
def test_what_follows_urgent_data_is_not_left_behind(rule: Rule, before: int) -> None:
    """A read ends in front of the mark, and splice(2) never passes it (tcp(7), RFC 6093)."""
    sent = threading.Event()

    def late(judged: Judged, upcall: _core.Upcall) -> None:
        if upcall.kind == _core.OUTBOUND:
            assert sent.wait(DEADLINE)
        rule(judged, upcall)

    first, last = os.urandom(before), os.urandom(5)
    with pair(late) as lab:
        listener = lab.listen()
        sock = lab.connect()

        def send() -> None:
            sock.sendall(first)
            sock.send(b"!", socket.MSG_OOB)
            sock.sendall(last)

        thread = threading.Thread(target=send)
        thread.start()
        if before == LARGE:
            # It does not fit: the rest follows while the tunnel reads.
            sent.set()
        else:
            thread.join()
            sent.set()
        app, _ = lab.accept(listener)
        wanted = len(first) + len(last)
        found = b""
        while len(found) < wanted:
            found += app.recv(1 << 20)
        thread.join()
        # The urgent byte itself is out of band, and no tunnel carries it.
        assert found == first + last


def test_a_decision_to_hand_over_names_what_it_needs() -> None:
    with pair() as lab:
        core, address = lab.client.core, bytes(16)
        core.add_series(SERIES + 1)
        with pytest.raises(KeyError):
            core.decide_hand_over(100, SERIES, SERIES + 1, 99, address, 80)
        with pytest.raises(KeyError):
            core.decide_hand_over(100, SERIES, SERIES + 9, 1, address, 80)
        for mirror, pod, port in ((0, 1, 80), (SERIES + 1, 0, 80), (SERIES + 1, 1, 0)):
            with pytest.raises(ValueError, match="two series, a pod and a port"):
                core.decide_hand_over(100, SERIES, mirror, pod, address, port)
        core.decide_hand_over(100, SERIES, SERIES + 1, 1, address, 80)
        core.release_decision(100)
