"""What the doctor reads: packet filters, metrics, files, processes, and half-open connections."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from nodeagent.doctor.facts import Drop, Outcome
from nodeagent.doctor.gather import filters, host, probes, processes, tunnel
from nodeagent.doctor.gather.processes import Process
from nodeagent.identity import EmbeddedCa
from nodeagent.settings import Settings
from ztunnel.spiffe import SpiffeId

# --- packet filters -------------------------------------------------------------------------------


def port(right: Any, op: str = "==", protocol: str = "tcp") -> dict[str, Any]:  # noqa: ANN401 - nft's JSON
    payload = {"payload": {"protocol": protocol, "field": "dport"}}
    return {"match": {"op": op, "left": payload, "right": right}}


def ruleset(*expressions: dict[str, Any]) -> dict[str, Any]:
    rule = {"family": "inet", "table": "t", "chain": "c", "handle": 7, "expr": list(expressions)}
    return {"nftables": [{"metainfo": {}}, {"table": {"name": "t"}}, {"rule": rule}]}


DROP: dict[str, Any] = {"drop": None}


@pytest.mark.parametrize(
    "match",
    [
        port(15008),
        port({"range": [15000, 16000]}),
        port({"set": [22, 15008]}),
        port({"set": [22, {"range": [15001, 15010]}]}),
        port(22, "!="),
        port(15008, protocol="th"),
    ],
)
def test_rules_that_drop_the_port_are_found(match: dict[str, Any]) -> None:
    found = filters.rules_of(ruleset(match, DROP), "nsenter --net=x ")
    command = "nsenter --net=x nft delete rule inet t c handle 7"
    assert found.drops == (Drop("rule 7 of inet t c", command),)
    assert filters.rules_of(ruleset(match, {"reject": {"type": "tcp reset"}})).drops


@pytest.mark.parametrize(
    "expressions",
    [
        (port(22), DROP),
        (port(15008), {"accept": None}),
        (port(15008, "!="), DROP),
        (port("@ports"), DROP),
        (port(15008, protocol="udp"), DROP),
        (DROP,),
        (),
        ({"match": "odd"}, DROP),
        ({"match": {"left": {"payload": None}}}, DROP),
    ],
)
def test_other_rules_are_no_finding(expressions: tuple[dict[str, Any], ...]) -> None:
    assert filters.rules_of(ruleset(*expressions)) == filters.Rules()


@pytest.mark.parametrize("odd", [None, [], {}, {"nftables": [1, {"rule": 2}, {}]}])
def test_what_is_no_rule_set_is_no_finding(odd: object) -> None:
    assert filters.rules_of(odd) == filters.Rules()


def test_redirects_are_told() -> None:
    found = filters.rules_of(ruleset({"redirect": {"port": 15001}}))
    assert found.redirects == ("packet filter rule 7 of inet t c redirects",)


def test_endless_rules_are_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endless, silent, broken = (tmp_path / name for name in ("endless", "silent", "broken"))
    endless.write_text("#!/bin/sh\nexec cat /dev/zero\n")
    silent.write_text("#!/bin/sh\nexec sleep 60\n")
    broken.write_text("#!/bin/sh\nexit 7\n")
    for path in (endless, silent, broken):
        path.chmod(0o755)
    monkeypatch.setattr(filters, "MOST_BYTES", 10_000)
    monkeypatch.setattr(filters, "SECONDS", 0.2)
    for path, said in ((endless, "more than 10000 bytes"), (silent, "0.2 s"), (broken, "with 7")):
        with pytest.raises(ValueError, match=said):
            filters._listed(str(path))


# --- ztunnel's metrics ----------------------------------------------------------------------------

METRICS = """\
# TYPE ztunnel_build_info gauge
ztunnel_build_info{version="1.2"} 1.0
ztunnel_descriptors 10.0
ztunnel_descriptors_limit 20.0
ztunnel_svid_expiry_timestamp_seconds{identity="spiffe://a/b"} 1.5e+09
ztunnel_tls_handshake_failures_total{reason="certificate_expired"} 2.0
istio_tcp_connections_failed_total{a="b",response_flags="NETWORK_POLICY"} 3
istio_tcp_connections_failed_total{a="c",response_flags="NETWORK_POLICY"} 4
istio_tcp_connections_failed_total{a="b",response_flags="DENY"} 9
unknown_total 1
"""


def test_the_few_series_are_read_out_of_all() -> None:
    found = tunnel.counts_of(METRICS.splitlines())
    assert (found.release, found.blocked) == ("1.2", 7)
    assert (found.descriptors, found.descriptors_most) == (10, 20)
    assert found.handshake_failures == {"certificate_expired": 2}
    assert found.expiries == {"spiffe://a/b": 1.5e9}


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    for name in ("state", "run", "mesh.d"):
        (tmp_path / name).mkdir(mode=0o700)
    return Settings(
        state_dir=tmp_path / "state", run_dir=tmp_path / "run", config_dir=tmp_path / "mesh.d"
    )


def make_ca(settings: Settings, age_days: float) -> None:
    """Have the product's CA make its files, so many days ago."""

    async def fetch() -> None:
        ca = EmbeddedCa(
            settings.ca_dir,
            "cluster.local",
            ttl_seconds=3600,
            permitted=lambda _: True,
            wall_clock=lambda: time.time() - age_days * 86400,
        )
        await ca.fetch(SpiffeId("cluster.local", "/ns/a/sa/b"))

    asyncio.run(fetch())


def test_the_ca_is_read_without_its_keys(settings: Settings) -> None:
    assert host.authority(settings).made is False
    make_ca(settings, 75)
    found = host.authority(settings)
    assert (found.made, found.root_key, found.problem) == (True, True, "")
    assert {each.kind: each.file for each in found.certificates} == {
        "root": "root.pem",
        "intermediate": "intermediate.pem",
    }
    (intermediate,) = (each for each in found.certificates if each.kind == "intermediate")
    left = intermediate.not_after.timestamp() - time.time()
    assert 14 * 86400 < left < 15 * 86400
    assert "PRIVATE" not in repr(found)
    assert host.loose(settings, None) == ()


def test_a_damaged_ca_is_told(settings: Settings) -> None:
    make_ca(settings, 0)
    (settings.ca_dir / "intermediate.pem").write_text("cut short")
    assert host.authority(settings).problem.startswith("intermediate.pem cannot be read")
    (settings.ca_dir / "root.pem").unlink()
    assert host.authority(settings).problem == "root.pem is gone, while its CA is in use"


def test_what_others_may_read_is_told_with_the_command_that_closes_it(settings: Settings) -> None:
    make_ca(settings, 0)
    key = settings.ca_dir / "root-key.pem"
    key.chmod(0o640)
    settings.config_dir.chmod(0o770)
    settings.run_dir.chmod(0o755)
    found = {each.path: each for each in host.loose(settings, None)}
    assert found.keys() == {str(key), str(settings.config_dir), str(settings.run_dir)}
    assert found[str(key)].problem == "mode 0640: others may read or change it"
    for each in found.values():
        assert os.system(each.command) == 0  # noqa: S605 - the remedy, as a person runs it
    assert host.loose(settings, None) == ()


def test_room_is_told_once_for_each_file_system(settings: Settings) -> None:
    (disk,) = host.disks(settings)
    assert 0 <= disk.free <= disk.size
    assert disk.path == str(settings.state_dir)


def test_the_clock_says_whether_anything_keeps_it_right() -> None:
    assert host.clock().synchronised in (True, False)


# --- processes ------------------------------------------------------------------------------------


def test_other_meshes_agents_are_known_by_their_names() -> None:
    running = [
        Process(1, "pilot-agent", ("pilot-agent", "proxy")),
        Process(2, "ztunnel", ("/usr/local/bin/ztunnel", "proxy", "ztunnel")),
        Process(3, "ztunnel", ("/opt/nodeagent/bin/ztunnel", "--control", "/run/x.sock")),
        Process(4, "bash", ("bash",)),
    ]
    assert [(each.pid, each.what) for each in processes.strangers(running)] == [
        (1, "Istio's sidecar"),
        (2, "Istio's ztunnel"),
    ]
    assert processes.tunnel_of(Path("/run/x.sock"), running) == 3
    assert processes.tunnel_of(Path("/run/y.sock"), running) == 0


def test_a_listener_is_found_with_its_process() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        number = sock.getsockname()[1]
        sockets = processes.listening([number])
        known = processes.socket_holders()
        (found,) = processes.holders(sockets, known, frozenset())
        assert (found.port, found.pid, found.ours) == (number, os.getpid(), False)
        (ours,) = processes.holders(sockets, known, frozenset({os.getpid()}))
        assert ours.ours
    assert processes.listening([number]) == {}
    # What nobody holds, or systemd for a daemon, is nobody else's.
    assert processes.holders({1: [5]}, {}, frozenset())[0].ours
    assert processes.holders({1: [5]}, {5: (1, "systemd")}, frozenset())[0].ours


def test_this_process_is_described_and_no_other() -> None:
    found = processes.described("nodeagent", os.getpid())
    assert found is not None
    assert 0 < found.descriptors < found.descriptors_most
    assert processes.described("nodeagent", 0) is None
    assert processes.described("nodeagent", 2**22 + 1) is None


# --- half-open connections ------------------------------------------------------------------------


@pytest.mark.netns
@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_syn_tells_an_open_port_and_opens_no_connection(address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as listener:
        number = listener.getsockname()[1]
        assert probes.half_open([address], number) == {address: Outcome.ANSWERED}
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert probes.half_open([address], number) == {address: Outcome.REFUSED}


def test_the_checksum_is_that_of_rfc_1071() -> None:
    # RFC 1071, 3: the sum of these words is ddf2.
    assert probes._checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0xDDF2 ^ 0xFFFF


def test_settings_hold_the_audit_file(tmp_path: Path, settings: Settings) -> None:
    audit = msgspec.structs.replace(settings.audit, file=str(tmp_path / "audit/audit.log"))
    found = host.disks(msgspec.structs.replace(settings, audit=audit))
    assert len(found) == 1
