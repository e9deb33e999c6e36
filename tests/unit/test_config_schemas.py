"""The JSON Schemas and CRDs beside the code: current, and as wide as the loader."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from nodeagent import api, offline
from support.resources import authorization, identities, peer, read, refuse, service, workload

DIRECTORY = Path(__file__).parents[2] / "schemas"

GOOD = {
    "PeerAuthentication": peer("a/b", "STRICT", selector={"app": "web"}, ports={80: "DISABLE"}),
    "WorkloadEntry": workload("a/w", "10.0.0.1", labels={"app": "web"}, ports={"http": 8080}),
    "ServiceEntry": service("a/s", endpoints=[{"address": "10.0.0.1", "weight": 3}]),
    "AuthorizationPolicy": authorization(
        "a/p",
        "DENY",
        [
            {
                "from": [
                    {"source": {"principals": ["*", "td/ns/*", "*/sa/x", "set:a/b", "td/x"]}},
                    {"source": {"serviceAccounts": ["x", "a/x"], "ipBlocks": ["::1", "::/0"]}},
                    {"source": {"notIpBlocks": ["10.0.0.0/8", "::ffff:10.0.0.1"]}},
                ],
                "to": [{"operation": {"ports": ["80"], "paths": ["/*"]}}],
                "when": [{"key": "source.namespace", "values": ["prod-*", "*-x", "*"]}],
            },
            {},
        ],
        selector={"app": "web"},
    ),
    "IdentitySet": identities("a/s", "spiffe://td/x", "td/*", "set:x", "*/y", "*"),
}

BAD = {
    "PeerAuthentication": peer("a/b", "STRIKT"),
    "WorkloadEntry": workload("a/w", "10.0.0.1", weight=0),
    "ServiceEntry": service("a/s", endpoints=[{"adress": "10.0.0.1"}]),
    "AuthorizationPolicy": authorization("a/p", "DENY", [{"from": []}]),
    "IdentitySet": identities("a/s", "a*b"),
}


def generated() -> dict[str, str]:
    found = importlib.util.spec_from_file_location("generate", DIRECTORY / "generate.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    files: dict[str, str] = module.files()
    return files


def test_schemas_are_current() -> None:
    present = {
        path.name: path.read_text(encoding="utf-8")
        for path in DIRECTORY.iterdir()
        if path.suffix in {".json", ".yaml"}
    }
    assert present == generated(), "run make schemas"


def accepts(schema: dict[str, Any], value: object) -> bool:
    """Judge by the keywords that the schemas use; another keyword fails the test."""
    rules = dict(schema)
    for ignored in ("$schema", "title", "description", "format"):
        rules.pop(ignored, None)
    kinds = rules.pop("type", None)
    wanted = [kinds] if isinstance(kinds, str) else kinds
    names = {
        dict: "object",
        list: "array",
        str: "string",
        int: "integer",
        bool: "boolean",
        type(None): "null",
    }
    if wanted is not None and names[type(value)] not in wanted:
        return False
    return all(JUDGES[keyword](argument, value, schema) for keyword, argument in rules.items())


def _properties(argument: dict[str, Any], value: Any, _schema: dict[str, Any]) -> bool:  # noqa: ANN401 - any JSON
    return all(accepts(argument[name], each) for name, each in value.items() if name in argument)


def _additional(argument: Any, value: Any, schema: dict[str, Any]) -> bool:  # noqa: ANN401 - any JSON
    rest = {name: each for name, each in value.items() if name not in schema.get("properties", {})}
    return not rest if argument is False else all(accepts(argument, each) for each in rest.values())


JUDGES: dict[str, Any] = {
    "properties": _properties,
    "additionalProperties": _additional,
    "required": lambda argument, value, _: set(argument) <= set(value),
    "propertyNames": lambda argument, value, _: all(accepts(argument, name) for name in value),
    "items": lambda argument, value, _: all(accepts(argument, each) for each in value),
    "minItems": lambda argument, value, _: len(value) >= argument,
    "enum": lambda argument, value, _: value in argument,
    "const": lambda argument, value, _: value == argument,
    "minimum": lambda argument, value, _: value >= argument,
    "maximum": lambda argument, value, _: value <= argument,
    "minLength": lambda argument, value, _: len(value) >= argument,
    "maxLength": lambda argument, value, _: len(value) <= argument,
    "pattern": lambda argument, value, _: re.search(argument, value) is not None,
}


@pytest.mark.parametrize("kind", GOOD)
def test_schemas_accept_what_the_loader_accepts(kind: str) -> None:
    (_,) = read(GOOD[kind])
    assert accepts(api.json_schemas()[kind], yaml.safe_load(GOOD[kind]))


@pytest.mark.parametrize("kind", BAD)
def test_schemas_find_common_mistakes(kind: str) -> None:
    refuse(BAD[kind])
    assert not accepts(api.json_schemas()[kind], yaml.safe_load(BAD[kind]))


def test_every_kind_has_a_schema() -> None:
    assert set(api.json_schemas()) == set(GOOD) == set(BAD)


def test_the_schema_of_tables_accepts_the_documented_one() -> None:
    schema = api.json_schema("PolicyTests", offline.Table)
    text = (DIRECTORY.parent / "docs" / "policy.md").read_text(encoding="utf-8")
    example = text.partition("```yaml\n# shop.tests.yaml\n")[2].partition("```")[0]
    offline.read_table(example.encode(), "shop.tests.yaml")
    table = yaml.safe_load(example)
    assert accepts(schema, table)
    assert not accepts(schema, {"tests": [{**table["tests"][0], "expect": "maybe"}]})
    assert not accepts(schema, {"tests": [{"from": "shop/web", "expect": "deny"}]})


def test_crd_says_what_the_schema_says_of_the_spec() -> None:
    (definition,) = api.custom_resource_definitions().values()
    (version,) = definition["spec"]["versions"]
    group = definition["spec"]["group"]
    document = yaml.safe_load(GOOD["IdentitySet"])
    assert document["apiVersion"] == f"{group}/{version['name']}"
    assert definition["metadata"]["name"] == f"{definition['spec']['names']['plural']}.{group}"
    schema = version["schema"]["openAPIV3Schema"]
    assert accepts(schema, document)
    assert not accepts(schema, yaml.safe_load(BAD["IdentitySet"]))
