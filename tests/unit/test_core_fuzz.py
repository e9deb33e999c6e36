"""The C fuzzers over their corpora and a bounded number of new inputs, and every lack of memory."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Final

import pytest

ROOT = Path(__file__).parents[2]
FUZZERS = sorted(path.stem for path in (ROOT / "tests/fuzz").glob("*.c"))

RUNS: Final = {"authority": 200_000}
"""New inputs for each; `make fuzz` goes on for as long as one likes. Others run a core for each
input, about a thousand in a second."""
USUAL_RUNS: Final = 2_000


def run(name: str, *arguments: str | Path) -> str:
    """Build and run the fuzzer; return what it said. A finding fails the test."""
    target = f"build/fuzz/{name}"
    subprocess.run(["make", "-s", target], cwd=ROOT, check=True, capture_output=True)
    done = subprocess.run(
        [ROOT / target, "-timeout=30", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def test_there_are_fuzzers() -> None:
    assert FUZZERS


@pytest.mark.parametrize("name", FUZZERS)
def test_invariant_holds(name: str, tmp_path: Path) -> None:
    run(
        name,
        f"-runs={RUNS.get(name, USUAL_RUNS)}",
        "-max_len=4096",
        f"-artifact_prefix={tmp_path}/",
        tmp_path,
        ROOT / "tests/fuzz/corpus" / name,
    )


@pytest.mark.parametrize("in_a_row", [1, 3, 16])
def test_every_allocation_fails_once(in_a_row: int, tmp_path: Path) -> None:
    """The first, then the second, … until the whole script has run without reaching its turn."""
    plenty = tmp_path / "plenty"
    plenty.write_bytes(bytes(3))
    asked = int(re.findall(r"allocations: (\d+)", run("no_memory", plenty))[0])
    assert asked > 300
    for number in range(1, asked + 1):
        name = tmp_path / f"{number:05}"
        name.write_bytes(number.to_bytes(2, "little") + bytes([in_a_row - 1]))
    said = run("no_memory", "-runs=0", f"-artifact_prefix={tmp_path}/", tmp_path)
    # The empty input, what was asked for, and as many as there are.
    assert re.search(rf"#{asked + 2}\s+DONE", said), said[-2000:]
