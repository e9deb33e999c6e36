"""`nodeagent policy explain` without files: the running agent is asked for what is in force."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from aiohttp import web
from click.testing import CliRunner, Result

from nodeagent.admin import AdminServer, Configuration
from nodeagent.admin.configuration import CONFIGURATION_SCHEMA, Documents
from nodeagent.cli import cli
from support.admin import Answers, beside
from support.resources import read
from support.shop import CALLERS, MESH, STRICT


def of_agent(tmp_path: Path, found: Configuration | None, *arguments: str) -> Result:
    return beside(tmp_path, Answers(configuration=found), "policy", *arguments)


def configuration(pending: str = "", problems: tuple[str, ...] = ()) -> Configuration:
    return Configuration(
        schema=CONFIGURATION_SCHEMA,
        source="/etc/nodeagent/mesh.d",
        pending=pending,
        problems=problems,
        node="n1",
        cluster="c",
        trust_domain="cluster.local",
        root_namespace="istio-system",
        locality="",
        node_addresses=(),
        node_plaintext=False,
        trusted=("cluster.local", "other.example"),
        documents=Documents.of(read(MESH + CALLERS, file="/etc/nodeagent/mesh.d/shop.yaml")),
    )


def test_without_files_the_agent_is_asked_for_what_is_in_force(tmp_path: Path) -> None:
    asked = ("explain", "shop/web", "shop/pay:8080")
    result = of_agent(tmp_path, configuration(), *asked)
    assert (result.exit_code, result.stderr) == (1, "")
    assert "- shop/callers (/etc/nodeagent/mesh.d/shop.yaml:35)" in result.stdout
    assert "config   in force on n1" in result.stdout


def test_what_the_agent_trusts_is_trusted(tmp_path: Path) -> None:
    stranger = "spiffe://other.example/ns/shop/sa/web"
    asked = ("explain", stranger, "shop/web:80")
    assert of_agent(tmp_path, configuration(), *asked).exit_code == 0


def test_what_is_not_in_force_yet_is_said(tmp_path: Path) -> None:
    waiting = configuration("ztunnel is not connected", ("shop.yaml:1:1: bad",))
    result = of_agent(tmp_path, waiting, "explain", "shop/web", "shop/pay:8080")
    assert result.exit_code == 1
    assert "note: ztunnel is not connected\n" in result.stderr
    assert "note: refused, a last good version is in force: shop.yaml:1:1: bad\n" in result.stderr


def test_the_agents_warnings_are_in_its_status(tmp_path: Path) -> None:
    disable = STRICT.replace("STRICT", "DISABLE")
    documents = Documents.of(read(MESH + CALLERS + disable, file="shop.yaml"))
    found = msgspec.structs.replace(configuration(), documents=documents)
    result = of_agent(tmp_path, found, "explain", "shop/web", "shop/pay:8080")
    assert result.stderr == "note: 1 warning: nodeagent status shows what has no effect\n"


def test_an_agent_of_another_release_is_none_to_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = msgspec.structs.replace(configuration(), schema=CONFIGURATION_SCHEMA + 1)
    result = of_agent(tmp_path, other, "explain", "shop/web", "shop/pay:80")
    assert result.exit_code == 3
    assert "configuration schema 2, this command 1" in result.stderr
    (tmp_path / "admin.sock").unlink()
    monkeypatch.setattr("nodeagent.admin.server.AdminServer._configuration", _not_found)
    older = of_agent(tmp_path, None, "explain", "shop/web", "shop/pay:80")
    assert older.exit_code == 3
    assert "nodeagent knows no /configuration" in older.stderr
    assert "own release" in older.stderr


async def _not_found(_server: AdminServer, _request: web.Request) -> web.Response:
    raise web.HTTPNotFound


def test_an_agent_that_cannot_be_asked(tmp_path: Path) -> None:
    asked = ("shop/web", "shop/pay:80", "--run-dir", str(tmp_path))
    for output in ("text", "json"):
        result = CliRunner().invoke(cli, ["policy", "explain", *asked, "-o", output])
        assert (result.exit_code, result.stdout) == (3, "")
        assert "nodeagent does not run here" in result.stderr
        assert "as FILE" in result.stderr
    early = of_agent(tmp_path, None, "explain", "shop/web", "shop/pay:80")
    assert early.exit_code == 3
    assert "no configuration is in force yet" in early.stderr
