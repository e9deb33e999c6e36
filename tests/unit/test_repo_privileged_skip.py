"""A privileged test that did not run must not look like one that passed."""

from __future__ import annotations

from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"

MODULE = """
import pytest

@pytest.mark.netns
def test_skips_itself():
    pytest.skip("no kernel for this")

@pytest.mark.netns
@pytest.mark.xfail(reason="known", strict=True)
def test_expected_failure():
    raise AssertionError

def test_unprivileged_skip():
    pytest.skip("optional")
"""


@pytest.fixture
def inner(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    pytester.makeconftest(CONFTEST.read_text(encoding="utf-8"))
    pytester.makeini("[pytest]\nmarkers =\n    netns: x\n    interop: x\n")
    # Neither the privileges of the machine that runs this nor its settings matter.
    monkeypatch.delenv("NODEAGENT_REQUIRE_PRIVILEGED", raising=False)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    return pytester


@pytest.mark.parametrize(
    "required, outcomes",
    [
        pytest.param("0", {"skipped": 2, "xfailed": 1}, id="at a desk"),
        pytest.param("1", {"failed": 1, "skipped": 1, "xfailed": 1}, id="in CI"),
    ],
)
def test_skip_of_a_privileged_test(
    inner: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
    required: str,
    outcomes: dict[str, int],
) -> None:
    monkeypatch.setenv("NODEAGENT_REQUIRE_PRIVILEGED", required)
    # The inner run must reach the tests' own skips on any machine.
    conftest = inner.path / "conftest.py"
    source = conftest.read_text(encoding="utf-8")
    conftest.write_text(
        source + "\n\ndef missing_privileges() -> list[str]:\n    return []\n", encoding="utf-8"
    )
    inner.makepyfile(MODULE)
    inner.runpytest("-p", "no:cacheprovider").assert_outcomes(**outcomes)


@pytest.mark.parametrize(
    "required, outcomes",
    [
        pytest.param("0", {"skipped": 1}, id="at a desk"),
        pytest.param("1", {"errors": 1}, id="in CI"),
    ],
)
def test_lack_of_privileges(
    inner: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
    required: str,
    outcomes: dict[str, int],
) -> None:
    monkeypatch.setenv("NODEAGENT_REQUIRE_PRIVILEGED", required)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    inner.makepyfile("import pytest\n\n@pytest.mark.netns\ndef test_needs_root():\n    pass\n")
    result = inner.runpytest("-p", "no:cacheprovider", "-rs")
    result.assert_outcomes(**outcomes)
    result.stdout.fnmatch_lines(["*needs uid 0*"])


@pytest.mark.parametrize(
    "required, expected",
    [
        pytest.param("0", pytest.ExitCode.NO_TESTS_COLLECTED, id="at a desk"),
        pytest.param("1", pytest.ExitCode.INTERRUPTED, id="in CI"),
    ],
)
def test_module_that_skips_as_a_whole(
    inner: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
    required: str,
    expected: pytest.ExitCode,
) -> None:
    monkeypatch.setenv("NODEAGENT_REQUIRE_PRIVILEGED", required)
    directory = inner.mkdir("netns")
    (directory / "test_whole.py").write_text(
        "import pytest\npytest.skip('no tool', allow_module_level=True)\n", encoding="utf-8"
    )
    assert inner.runpytest("-p", "no:cacheprovider").ret == expected


def test_directory_marks_its_tests(inner: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    directory = inner.mkdir("interop")
    (directory / "test_unmarked.py").write_text("def test_it():\n    pass\n", encoding="utf-8")
    inner.runpytest("-p", "no:cacheprovider", "-m", "interop").assert_outcomes(skipped=1)
