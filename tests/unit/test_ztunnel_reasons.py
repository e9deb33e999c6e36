from __future__ import annotations

import re
from pathlib import Path

import pytest

from ztunnel import reasons
from ztunnel.reasons import Reason

HEADER = Path(reasons.__file__).parent / "_core" / "reasons.h"

ISTIO_FLAGS = {
    "-",
    "DENY",
    "CONNECT",
    "TLS_FAILURE",
    "H2_HANDSHAKE_FAILURE",
    "NETWORK_POLICY",
    "IDENTITY_ERROR",
    "CERT_REVOKED",
}


def test_the_tokens_are_the_headers_in_its_order() -> None:
    tokens = tuple(re.findall(r'X\(\w+, "(\w+)"\)', HEADER.read_text(encoding="utf-8")))
    reasons.check(tokens)


def test_a_core_with_other_reasons_is_refused_by_name() -> None:
    tokens = tuple(reason.value for reason in Reason)
    with pytest.raises(reasons.ReasonsMismatchError, match="brand_new"):
        reasons.check((*tokens, "brand_new"))
    with pytest.raises(reasons.ReasonsMismatchError, match="order"):
        reasons.check(tokens[::-1])


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_has_a_flag_that_istio_knows_and_a_cause(reason: Reason) -> None:
    assert reasons.RESPONSE_FLAGS[reason] in ISTIO_FLAGS
    if reason is not Reason.CLOSED:
        assert reasons.CAUSES[reason]


def test_a_timeout_towards_hbone_names_the_likely_culprit() -> None:
    assert "NetworkPolicy" in reasons.explain(Reason.CONNECT_TIMEOUT, hbone=True)
    assert "15008" in reasons.explain(Reason.CONNECT_REFUSED, hbone=True)
    assert "15008" not in reasons.explain(Reason.CONNECT_TIMEOUT, hbone=False)
    assert reasons.flag(Reason.CONNECT_TIMEOUT, hbone=True) == "NETWORK_POLICY"
    assert reasons.flag(Reason.CONNECT_TIMEOUT, hbone=False) == "CONNECT"


def test_the_document_has_every_reason_with_its_flag_and_cause() -> None:
    document = (Path(reasons.__file__).parent.parent / "docs" / "access-log.md").read_text("utf-8")
    part = document.partition("### Why a connection ended")[2].partition("\n#")[0]
    rows = re.findall(r"^\| `(\w+)` \| `(\S+)` \| (.*?) ?\|$", part, re.MULTILINE)
    assert rows == [
        (each.value, reasons.RESPONSE_FLAGS[each], reasons.CAUSES[each]) for each in Reason
    ]
