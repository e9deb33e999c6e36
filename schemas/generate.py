"""Writes the files beside it: a JSON Schema for each kind and for tables of policy tests, and the
CRDs of our own kinds.

Owns their names and form. Promises that the files hold what the readers' types say and nothing
else; a test fails when they are not current.
"""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from nodeagent import api, offline


def files() -> dict[str, str]:
    """Return the text of each file by name."""
    found = {
        f"{kind}.json": json.dumps(schema, indent=2) + "\n"
        for kind, schema in api.json_schemas().items()
    }
    found["PolicyTests.json"] = (
        json.dumps(api.json_schema("PolicyTests", offline.Table), indent=2) + "\n"
    )
    for name, definition in api.custom_resource_definitions().items():
        found[f"{name}.yaml"] = yaml.safe_dump(definition, sort_keys=False)
    return found


if __name__ == "__main__":
    for name, text in files().items():
        (Path(__file__).parent / name).write_text(text, encoding="utf-8")
