"""What `/settings` and `/certificates` say: pure, from what the daemon holds."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import msgspec

from nodeagent.admin.certificates import CertificatesReport
from nodeagent.admin.settings import SettingReport, SettingsReport, settings_report
from nodeagent.certificates_report import certificates_report, detail
from nodeagent.identity import IdentityPhase, IdentityState, IdentityStatus
from nodeagent.identity import _certificates as made
from nodeagent.settings import read_settings
from ztunnel import protocol
from ztunnel.spiffe import SpiffeId

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
ID = "spiffe://cluster.local/ns/shop/sa/web"
SECRET = b"the private key"


def settings(folder: Path, text: str) -> dict[str, SettingReport]:
    path = folder / "nodeagent.yaml"
    path.write_text(text)
    found = settings_report(str(path), read_settings(path))
    assert found.file == str(path)
    found = msgspec.json.decode(msgspec.json.encode(found), type=SettingsReport)
    return {each.name: each for each in found.settings}


def test_settings_have_the_value_the_default_and_the_line(tmp_path: Path) -> None:
    found = settings(
        tmp_path,
        "node: n1\n"
        "state_dir: /srv/state\n"
        "node_addresses:\n"
        "- 192.0.2.1\n"
        "limits:\n"
        "  dials: 9\n"
        "audit: {file: /var/log/ztunnel/audit.log, syslog: 'udp://192.0.2.10:514'}\n",
    )
    shown = {name: (found[name].value, found[name].default, found[name].line) for name in found}
    assert shown["node"][0::2] == ("n1", 1)
    assert shown["state_dir"] == ("/srv/state", "/var/lib/nodeagent", 2)
    assert shown["node_addresses"] == (["192.0.2.1"], [], 4)
    assert shown["limits.dials"] == (9, 4096, 6)
    assert shown["limits.questions"] == (512, 512, 0)
    assert shown["audit.file"] == ("/var/log/ztunnel/audit.log", "", 7)
    assert shown["audit.syslog"][0] == "udp://192.0.2.10:514"
    # It follows from another one, and that is its default.
    assert shown["ca_dir"] == ("/srv/state/ca", "/srv/state/ca", 0)
    assert shown["same_node"] == ("hbone", "hbone", 0)


def test_every_setting_of_the_documentation_is_told(tmp_path: Path) -> None:
    found = settings(tmp_path, "{}\n")
    text = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
    for name, each in found.items():
        assert f"`{name.rpartition('.')[2]}`" in text, name
        assert each.value == each.default, name


def state(phase: IdentityPhase = IdentityPhase.VALID, not_after: int = 20) -> IdentityState:
    return IdentityState(
        identity=ID,
        phase=phase,
        not_before=not_after and 10,
        not_after=not_after,
        renew_at=15.5,
        failures=2,
        failed=4,
        issued=3,
        last_reason="unavailable",
        last_error="CA down",
    )


def chain() -> tuple[tuple[bytes, ...], bytes]:
    now = int(NOW.timestamp())
    root_key, signing_key = made.new_key(), made.new_key()
    root = made.make_root("cluster.local", root_key, now)
    signer = made.Signer(root, root_key)
    intermediate = made.make_intermediate(signer, "cluster.local", signing_key, now)
    leaf = made.make_leaf(
        made.Signer(intermediate, signing_key),
        SpiffeId.parse(ID),
        made.new_key().public_key(),
        now,
        3600,
    )
    return (made.der(leaf), made.der(intermediate)), made.der(root)


def report(
    status: IdentityStatus, *resources: protocol.Resource, workloads: tuple[str, ...] = ()
) -> CertificatesReport:
    found = certificates_report(
        NOW, "n1", "cluster.local", status, resources, dict.fromkeys(workloads, ID)
    )
    encoded = msgspec.json.encode(found)
    assert SECRET not in encoded
    return msgspec.json.decode(encoded, type=CertificatesReport)


def test_certificates_are_told_with_chain_roots_and_who_has_them() -> None:
    ders, root = chain()
    status = IdentityStatus((state(),), (("cluster.local", 1),), "issuer gone")
    found = report(
        status,
        protocol.Credential(ID, ders, SECRET, 10, 20),
        protocol.TrustBundle("cluster.local", (root,)),
        workloads=("shop/web-2", "shop/web-1"),
    )
    (identity,) = found.identities
    assert (identity.identity, identity.phase) == (ID, "valid")
    assert identity.renew_at == datetime.fromtimestamp(15, UTC)
    assert (identity.renewals, identity.failures, identity.error) == (3, 2, "CA down")
    assert identity.workloads == ("shop/web-1", "shop/web-2")
    leaf, intermediate = identity.chain
    (anchor,) = found.roots
    assert leaf.issuer == intermediate.subject
    assert intermediate.issuer == anchor.certificate.subject
    assert leaf.key == "EC secp256r1"
    assert leaf.not_after is not None
    assert leaf.not_after.timestamp() == NOW.timestamp() + 3600
    assert int(leaf.serial, 16) > 0
    assert found.bundle_error == "issuer gone"


def test_an_identity_without_a_certificate_has_no_chain() -> None:
    status = IdentityStatus((state(IdentityPhase.UNAVAILABLE, 0),), (), "")
    ders, _ = chain()
    (identity,) = report(status, protocol.Credential(ID, ders, SECRET, 10, 20)).identities
    assert (identity.not_after, identity.chain) == (None, ())


def test_what_is_no_certificate_is_said_to_be_none() -> None:
    found = detail(b"garbage")
    assert found.error.startswith("cannot be read")
    assert len(found.sha256) == 64
