"""The Python fuzzers over their corpora, in this process, and a bounded number of new inputs."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final, cast

import pytest

ROOT = Path(__file__).parents[2]
FUZZERS = sorted(path.stem for path in (ROOT / "tests/fuzz").glob("*.py"))

NEW_RUNS: Final = 500
"""A few seconds for each; `make fuzz` goes on for as long as one likes."""


def invariant(name: str) -> Callable[[bytes], None]:
    spec = importlib.util.spec_from_file_location(f"fuzz_{name}", ROOT / f"tests/fuzz/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return cast("Callable[[bytes], None]", module.test_one_input)


def test_there_are_fuzzers() -> None:
    assert FUZZERS


@pytest.mark.parametrize("name", FUZZERS)
def test_invariant_holds_for_the_corpus(name: str) -> None:
    holds = invariant(name)
    corpus = sorted((ROOT / "tests/fuzz/corpus" / name).iterdir())
    assert corpus
    for path in corpus:
        holds(path.read_bytes())
        holds(path.read_bytes()[:-1])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="there is no atheris for this machine")
@pytest.mark.parametrize("name", FUZZERS)
def test_invariant_holds_for_new_inputs(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            ROOT / f"tests/fuzz/{name}.py",
            f"-runs={NEW_RUNS}",
            "-timeout=30",
            "-max_len=8192",
            f"-artifact_prefix={tmp_path}/",
            tmp_path,
            ROOT / "tests/fuzz/corpus" / name,
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
