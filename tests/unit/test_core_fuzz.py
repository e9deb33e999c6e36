"""The C parsers' fuzzers over their corpora and a bounded number of new inputs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FUZZERS = sorted(path.stem for path in (ROOT / "tests/fuzz").glob("*.c"))
RUNS = 200_000
"""A few seconds; `make fuzz` goes on for as long as one likes."""


def test_there_are_fuzzers() -> None:
    assert FUZZERS


@pytest.mark.parametrize("name", FUZZERS)
def test_invariant_holds(name: str, tmp_path: Path) -> None:
    target = f"build/fuzz/{name}"
    subprocess.run(["make", "-s", target], cwd=ROOT, check=True, capture_output=True)
    done = subprocess.run(
        [
            ROOT / target,
            f"-runs={RUNS}",
            f"-artifact_prefix={tmp_path}/",
            tmp_path,
            ROOT / "tests/fuzz/corpus" / name,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
