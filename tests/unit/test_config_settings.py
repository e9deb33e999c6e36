"""Settings of the daemon: defaults, refusals and where they stand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nodeagent.api import ConfigError
from nodeagent.settings import LogFormat, LogLevel, Settings, load_settings
from ztunnel.protocol import Deadlines, Limits, SameNode


def write(folder: Path, text: str) -> Path:
    path = folder / "nodeagent.yaml"
    path.write_text(text)
    return path


def test_config_settings_defaults() -> None:
    settings = Settings(node="n1")
    assert settings.trust_domain == "cluster.local"
    assert settings.root_namespace == "istio-system"
    assert settings.run_dir == Path("/run/nodeagent")
    assert settings.ca_dir == Path("/var/lib/nodeagent/ca")
    assert Settings(node="n1", state_dir=Path("/s")).ca_dir == Path("/s/ca")
    assert Settings(node="n1", ca_dir=Path("/c")).ca_dir == Path("/c")


def test_config_settings_empty_file_means_defaults(tmp_path: Path) -> None:
    settings = load_settings(write(tmp_path, "# nothing\n"))
    assert settings == Settings(node=os.uname().nodename.lower())


def test_config_settings_file_is_read(tmp_path: Path) -> None:
    settings = load_settings(
        write(
            tmp_path,
            """
            node: n1
            cluster: west
            trust_domain: corp.example
            root_namespace: mesh-root
            locality: eu/a
            node_addresses: ["::ffff:192.0.2.1", "2001:DB8::1"]
            run_dir: /run/n1/
            state_dir: /var/lib//n1
            config_dir: /etc/n1
            bpf_dir: /sys/fs/bpf/n1
            svid_ttl_seconds: 600
            admin_address: "[::1]:15000"
            log_format: json
            log_level: debug
            same_node: direct
            node_plaintext: true
            deadlines: {connect: 3, half_closed: 60}
            limits: {connections: 9, dials: 0}
            """,
        )
    )
    assert settings == Settings(
        node="n1", cluster="west", trust_domain="corp.example", root_namespace="mesh-root",
        locality="eu/a", node_addresses=("192.0.2.1", "2001:db8::1"), run_dir=Path("/run/n1"),
        state_dir=Path("/var/lib/n1"), config_dir=Path("/etc/n1"), bpf_dir=Path("/sys/fs/bpf/n1"),
        ca_dir=Path("/var/lib/n1/ca"), svid_ttl_seconds=600, admin_address="[::1]:15000",
        log_format=LogFormat.JSON, log_level=LogLevel.DEBUG,
        same_node=SameNode.DIRECT, deadlines=Deadlines(connect=3, half_closed=60),
        limits=Limits(connections=9, dials=0),
        node_plaintext=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    "line, field",
    [
        ("nodes: n1", "nodes"),
        ("node: N_1", "node"),
        ("node: no", "node"),
        ("trust_domain: Corp", "trust_domain"),
        ("root_namespace: a.b", "root_namespace"),
        ("locality: a//b", "locality"),
        ("node_addresses: 10.0.0.1", "node_addresses"),
        ("node_addresses: [127.0.0.1]", "node_addresses[0]"),
        ("run_dir: run", "run_dir"),
        ("run_dir: /", "run_dir"),
        ("run_dir: /run/../etc", "run_dir"),
        ('run_dir: "/run/a\\nb"', "run_dir"),
        ("svid_ttl_seconds: 59", "svid_ttl_seconds"),
        ("svid_ttl_seconds: 1e3", "svid_ttl_seconds"),
        ("svid_ttl_seconds: 604801", "svid_ttl_seconds"),
        ("svid_ttl_seconds: '600'", "svid_ttl_seconds"),
        ("admin_address: 0.0.0.0:15000", "admin_address"),
        ("admin_address: 10.0.0.1:15000", "admin_address"),
        ("admin_address: 127.0.0.1:0", "admin_address"),
        ("admin_address: 127.0.0.1:65536", "admin_address"),
        ("admin_address: 127.0.0.1:015000", "admin_address"),
        ("admin_address: 127.1:15000", "admin_address"),
        ("admin_address: localhost:15000", "admin_address"),
        ("admin_address: '127.0.0.1:15_00'", "admin_address"),
        ("log_format: xml", "log_format"),
        ("log_level: 3", "log_level"),
        ("cluster: ''", "cluster"),
        ("same_node: plaintext", "same_node"),
        ("limits: 3", "limits"),
        ("limits: {lunch: 3}", "limits.lunch"),
        ("limits: {dials: -1}", "limits.dials"),
        ("limits: {questions: 0}", "limits.questions"),
        ("limits: {held_bytes: 1000}", "limits.held_bytes"),
        ("node_plaintext: 1", "node_plaintext"),
        ("deadlines: 3", "deadlines"),
        ("deadlines: {lunch: 3}", "deadlines.lunch"),
        ("deadlines: {connect: 0}", "deadlines.connect"),
        ("deadlines: {connect: 301}", "deadlines.connect"),
        ("deadlines: {half_closed: 59}", "deadlines.half_closed"),
        ("deadlines: {idle: 604801}", "deadlines.idle"),
        ("deadlines: {idle: '300'}", "deadlines.idle"),
        ("node:", "node"),
    ],
)
def test_config_settings_refusals_name_the_field(tmp_path: Path, line: str, field: str) -> None:
    path = write(tmp_path, f"# first\n{line}\n")
    with pytest.raises(ConfigError) as caught:
        load_settings(path)
    assert (caught.value.file, caught.value.line, caught.value.field) == (str(path), 2, field)


def test_config_settings_all_errors_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(write(tmp_path, "log_level: x\nlog_format: y\nother: z\n"))
    assert [error.field for error in caught.value.others] == ["log_format", "other"]
    assert str(caught.value).count("\n") == 2


@pytest.mark.parametrize(
    "text", ["[]", "a", "node: n1\n---\nnode: n2\n", "node: &a n1", "node: [", "\x00"]
)
def test_config_settings_must_be_one_mapping(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        load_settings(write(tmp_path, text))


def test_config_settings_file_must_be_a_private_regular_file(tmp_path: Path) -> None:
    path = write(tmp_path, "node: n1\n")
    path.chmod(0o666)
    with pytest.raises(ConfigError, match="anybody may write"):
        load_settings(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_settings(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="directory"):
        load_settings(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConfigError, match="regular"):
        load_settings(tmp_path / "fifo")
    big = write(tmp_path, "#" * 100_000)
    big.chmod(0o600)
    with pytest.raises(ConfigError, match="larger"):
        load_settings(big)


def test_config_settings_probes_need_addresses_to_come_from(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="node_addresses"):
        load_settings(write(tmp_path, "node_plaintext: true\n"))
