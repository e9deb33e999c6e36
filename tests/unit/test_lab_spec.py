"""Lab files: what is accepted, and how mistakes are reported."""

from __future__ import annotations

from pathlib import Path

import pytest

from nodeagent.api import ConfigError
from nodeagent.lab import LabSpec, exercises, load, load_exercise
from nodeagent.lab.spec import load_bytes

GOOD = """\
name: small
nodes:
  - name: one
  - name: two
    settings: {svid_ttl_seconds: 60, log_level: debug}
pods:
  - name: client
    node: one
  - name: server
    namespace: shop
    node: two
    serviceAccount: seller
    labels: {app: server}
    addresses: [10.244.2.9, "fd00:10:244:2::9"]
    enrolled: false
    apps:
      - name: http
        command: [python, -m, nodeagent.lab.apps.httpbin]
        ready: 8000
services:
  - name: server
    namespace: shop
    ports: [{port: 80, targetPort: 8000}]
    selector: {app: server}
resources:
  - apiVersion: security.istio.io/v1
    kind: PeerAuthentication
    metadata: {name: default, namespace: shop}
    spec: {mtls: {mode: STRICT}}
"""


def parse(text: str) -> LabSpec:
    return load_bytes(text.encode(), "lab.yaml", None)


def refusals(text: str) -> list[ConfigError]:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    return [caught.value, *caught.value.others]


def test_a_whole_file() -> None:
    spec = parse(GOOD)
    client, server = spec.pods
    assert client.uid == "default/client"
    assert client.captured
    assert client.addresses == ()
    assert server.uid == "shop/server"
    assert server.service_account == "seller"
    assert server.addresses == ("10.244.2.9", "fd00:10:244:2::9")
    assert not server.captured
    assert server.apps[0].command == ("python", "-m", "nodeagent.lab.apps.httpbin")
    assert spec.services[0].selects(server)
    assert not spec.services[0].selects(client)
    assert spec.nodes[1].settings == {"svid_ttl_seconds": 60, "log_level": "debug"}
    assert spec.resources[0]["spec"] == {"mtls": {"mode": "STRICT"}}


@pytest.mark.parametrize("name", exercises())
def test_exercises_are_valid_and_named_as_their_files(name: str) -> None:
    assert load_exercise(name).name == name


def test_both_exercises_ship() -> None:
    assert exercises() == ["istioinaction", "sentences"]


# Each row replaces one part of GOOD; the error must name line, column and field.
MISTAKES = [
    ("name: small", "name: Small Lab", (1, 7, "name"), "no name"),
    ("name: small", "name: small\ncolour: red", (2, 1, "colour"), "unknown field"),
    ("  - name: two\n", "  - name: two\n  - name: two\n", (5, 11, "nodes[2].name"), "given twice"),
    (
        "  - name: client\n    node: one\n",
        "  - name: client\n    node: one\n" * 2,
        (9, 11, "pods[1].name"),
        "given twice",
    ),
    ("    node: one\n", "    node: three\n", (8, 11, "pods[0].node"), "there are one, two"),
    ("  - name: client\n    node: one", "  - name: client", (7, 5, "pods[0].node"), "is missing"),
    ("10.244.2.9", "10.244.1.9", (14, 17, "pods[1].addresses[0]"), "10.244.2.0/24"),
    ("10.244.2.9", "10.244.2.1", (14, 17, "pods[1].addresses[0]"), "10.244.2.0/24"),
    ("10.244.2.9", "10.244.2.300", (14, 17, "pods[1].addresses[0]"), "no IP address"),
    ('"fd00:10:244:2::9"', "10.244.2.8", (14, 29, "pods[1].addresses[1]"), "second IPv4"),
    ("ready: 8000", "ready: 70000", (19, 16, "pods[1].apps[0].ready"), "1 to 65535"),
    ("ready: 8000", 'ready: "8000"', (19, 16, "pods[1].apps[0].ready"), "without quotes"),
    ("enrolled: false", "enrolled: no", (15, 15, "pods[1].enrolled"), "true or false"),
    (
        "enrolled: false",
        "mesh: false\n    enrolled: true",
        (16, 15, "pods[1].enrolled"),
        "outside the mesh",
    ),
    (
        "command: [python, -m, nodeagent.lab.apps.httpbin]",
        "command: []",
        (18, 18, "pods[1].apps[0].command"),
        "is empty",
    ),
    (
        "{app: server}\n    addr",
        "{app: other}\n    addr",
        (24, 15, "services[0].selector"),
        "no pod",
    ),
    (
        "selector: {app: server}",
        "selector: {app: server}\n    addresses: [10.244.1.7]",
        (25, 17, "services[0].addresses[0]"),
        "take another",
    ),
    ("mode: STRICT", "mode: HARD", (29, 25, "resources[0].spec.mtls.mode"), "unknown"),
    ("kind: PeerAuthentication", "kind: Pod", (27, 11, "resources[0].kind"), "not read"),
    ("settings: {svid_ttl_seconds: 60, log_level: debug}", "settings: 7", None, "a mapping"),
]


@pytest.mark.parametrize("old,new,place,reason", MISTAKES, ids=[row[1] for row in MISTAKES])
def test_a_mistake_is_reported_with_its_place(
    old: str, new: str, place: tuple[int, int, str] | None, reason: str
) -> None:
    assert GOOD.count(old) >= 1
    (error, *more) = refusals(GOOD.replace(old, new, 1))
    assert not more
    assert error.file == "lab.yaml"
    assert reason in str(error)
    if place is not None:
        assert (error.line, error.column, error.field) == place


def test_all_mistakes_are_reported_at_once() -> None:
    text = GOOD.replace("node: one", "node: three").replace("name: two", "name: one", 1)
    assert len(refusals(text)) >= 2


@pytest.mark.parametrize("text", ["", "[]", "a: &x 1\nb: *x", "name: x\n---\nname: y\n", "\x00"])
def test_what_is_no_lab_file_is_refused(text: str) -> None:
    assert refusals(text)


def test_files_are_read_relative_to_the_lab_file(tmp_path: Path) -> None:
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "strict.yaml").write_text(
        "apiVersion: security.istio.io/v1\n"
        "kind: PeerAuthentication\n"
        "metadata: {name: x, namespace: istio-system}\n"
        "spec: {mtls: {mode: STRICT}}\n"
    )
    lab = tmp_path / "lab.yaml"
    lab.write_text("name: a\nnodes: [{name: one}]\nfiles: [policies/strict.yaml]\n")
    assert load(lab).resources[0]["metadata"]["name"] == "x"


def test_a_mistake_in_a_named_file_is_reported_there(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("kind: PeerAuthentication\n")
    lab = tmp_path / "lab.yaml"
    lab.write_text("name: a\nnodes: [{name: one}]\nfiles: [bad.yaml, none.yaml]\n")
    with pytest.raises(ConfigError) as caught:
        load(lab)
    places = {(Path(each.file).name, each.field) for each in (caught.value, *caught.value.others)}
    assert ("bad.yaml", "apiVersion") in places
    assert ("lab.yaml", "files[1]") in places
