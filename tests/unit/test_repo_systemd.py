"""The units: what systemd itself thinks of them, and, line by line, the promises that matter."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNITS = ("nodeagent.service", "ztunnel.service")
SYSTEM_UNITS = Path("/usr/lib/systemd/system")

EXPOSURE = {"nodeagent.service": 29, "ztunnel.service": 21}
"""Ceilings for `systemd-analyze security` in tenths: what is left is what the daemons' work needs.
They may fall, and do not rise without a reason in the unit."""


def directives(unit: str) -> dict[str, list[str]]:
    """Return each directive's values in order of appearance."""
    found: dict[str, list[str]] = {}
    for line in (ROOT / "systemd" / unit).read_text(encoding="utf-8").splitlines():
        if line and line[0] not in "#[":
            name, value = line.split("=", 1)
            found.setdefault(name, []).append(value)
    return found


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    tool = shutil.which("systemd-analyze")
    assert tool, "systemd-analyze is missing: run `make setup`"
    return subprocess.run(
        [tool, "--no-pager", *arguments],
        check=False,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A root directory with the system's own units, ours, and programs where ours expect them."""
    shutil.copytree(SYSTEM_UNITS, tmp_path / "usr/lib/systemd/system", symlinks=True)
    ours = tmp_path / "etc/systemd/system"
    ours.mkdir(parents=True)
    for unit in UNITS:
        shutil.copy(ROOT / "systemd" / unit, ours)
        found = directives(unit)
        for command in (*found["ExecStart"], *found["ExecReload"]):
            program = tmp_path / command.split()[0].lstrip("/")
            program.parent.mkdir(parents=True, exist_ok=True)
            program.write_text("#!/bin/sh\n", encoding="ascii")
            program.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("unit", UNITS)
def test_systemd_accepts_every_line(installed: Path, unit: str) -> None:
    done = analyze("verify", f"--root={installed}", unit)
    assert (done.returncode, done.stdout) == (0, "")


def test_verification_sees_a_wrong_line(installed: Path) -> None:
    unit = installed / "etc/systemd/system" / UNITS[0]
    text = unit.read_text(encoding="utf-8").replace("WatchdogSec=", "WatchDogSecs=")
    unit.write_text(text, encoding="utf-8")
    assert "WatchDogSecs" in analyze("verify", f"--root={installed}", UNITS[0]).stdout


@pytest.mark.parametrize("unit", UNITS)
def test_exposure_stays_below_its_ceiling(unit: str) -> None:
    path = str(ROOT / "systemd" / unit)
    done = analyze("security", "--offline=yes", f"--threshold={EXPOSURE[unit]}", path)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("unit", UNITS)
def test_every_directive_is_explained(unit: str) -> None:
    """Each block of lines follows a comment, but for the blocks that name themselves."""
    obvious = {"Description", "Documentation", "ExecStart", "WantedBy"}
    explained = False
    for line in (ROOT / "systemd" / unit).read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            explained = True
        elif not line or line.startswith("["):
            explained = False
        elif not explained:
            assert line.split("=", 1)[0] in obvious, f"{unit}: {line!r} stands without a reason"


PROMISES = {
    # Started when it is ready, and restarted when it no longer turns.
    "Type": ["notify"],
    "NotifyAccess": ["main"],
    "WatchdogSec": ["30"],
    "Restart": ["always"],
    # Pods are closed while a daemon is away: nothing may make systemd give up.
    "StartLimitIntervalSec": ["0"],
    # Keys.
    "LimitCORE": ["0"],
    "UMask": ["0077"],
    # What a taken-over daemon cannot do.
    "NoNewPrivileges": ["yes"],
    "AmbientCapabilities": [""],
    "ProtectSystem": ["strict"],
    "ProtectHome": ["yes"],
    "PrivateDevices": ["yes"],
    "PrivateTmp": ["yes"],
    "ProtectKernelModules": ["yes"],
    "ProtectKernelLogs": ["yes"],
    "ProtectControlGroups": ["yes"],
    "ProtectClock": ["yes"],
    "RestrictNamespaces": ["net"],
    "RestrictSUIDSGID": ["yes"],
    "LockPersonality": ["yes"],
    "MemoryDenyWriteExecute": ["yes"],
    "SystemCallArchitectures": ["native"],
    "WantedBy": ["multi-user.target"],
}

NODEAGENT_PROMISES = {
    # The pods' sockets and the state survive a restart.
    "FileDescriptorStoreMax": ["4096"],
    "RuntimeDirectory": ["nodeagent"],
    "RuntimeDirectoryMode": ["0700"],
    "RuntimeDirectoryPreserve": ["yes"],
    "StateDirectory": ["nodeagent"],
    "StateDirectoryMode": ["0700"],
    "CapabilityBoundingSet": ["CAP_BPF CAP_NET_ADMIN CAP_SYS_ADMIN CAP_SYS_PTRACE"],
    # The capture writes sysctls in the pods' namespaces.
    "ProtectKernelTunables": ["no"],
    "RestrictAddressFamilies": ["AF_UNIX AF_INET AF_INET6 AF_NETLINK"],
    "SystemCallFilter": ["@system-service", "~@privileged @resources", "bpf"],
}

ZTUNNEL_PROMISES = {
    "CapabilityBoundingSet": ["CAP_SYS_ADMIN CAP_NET_RAW"],
    "ProtectKernelTunables": ["yes"],
    "ProtectProc": ["invisible"],
    "RestrictAddressFamilies": ["AF_UNIX AF_INET AF_INET6"],
    "SystemCallFilter": ["@system-service", "~@privileged @resources"],
    "LimitNOFILE": ["1048576"],
    # The audit log's file.
    "LogsDirectory": ["ztunnel"],
    "LogsDirectoryMode": ["0750"],
}


@pytest.mark.parametrize(
    "unit, name, values",
    [
        *[(unit, name, values) for unit in UNITS for name, values in PROMISES.items()],
        *[("nodeagent.service", name, values) for name, values in NODEAGENT_PROMISES.items()],
        *[("ztunnel.service", name, values) for name, values in ZTUNNEL_PROMISES.items()],
    ],
)
def test_promise(unit: str, name: str, values: list[str]) -> None:
    assert directives(unit).get(name) == values


@pytest.mark.parametrize("unit", UNITS)
def test_either_daemon_restarts_alone(unit: str) -> None:
    """No dependency carries a stop, a start or a wait from one daemon to the other."""
    other = next(name for name in UNITS if name != unit)
    for name, values in directives(unit).items():
        assert not any(other in value.split() for value in values), f"{name} names {other}"


def test_both_daemons_mean_the_same_control_socket() -> None:
    run_dir = directives("nodeagent.service")["RuntimeDirectory"][0]
    command = directives("ztunnel.service")["ExecStart"][0].split()
    assert command[command.index("--control") + 1] == f"/run/{run_dir}/ztunnel.sock"


@pytest.mark.parametrize("unit", UNITS)
def test_programs_are_the_installed_ones(unit: str) -> None:
    """The Makefile installs where the units look, under the names of pyproject's scripts."""
    program = Path(directives(unit)["ExecStart"][0].split()[0])
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    prefix = re.search(r"^PREFIX \?= (\S+)$", makefile, re.MULTILINE)
    assert prefix
    assert program.parent == Path(prefix[1]) / "bin"
    scripts = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f"\n{program.name} = " in scripts


NO_WRITABLE_CODE = """
import ctypes, errno, mmap, sys
PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 65, 1
if ctypes.CDLL(None).prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0) != 0:
    print("unsupported")
    sys.exit()
try:
    mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_WRITE | mmap.PROT_EXEC)
except OSError:
    print("refused")
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def test_tls_contexts_need_no_writable_code(tmp_path: Path) -> None:
    """MemoryDenyWriteExecute= of the units, by the kernel's own switch for the same (Linux 6.3)."""
    script = tmp_path / "confined.py"
    script.write_text(NO_WRITABLE_CODE, encoding="ascii")
    inner = tmp_path / "test_inner.py"
    inner.write_text(
        "import time\n"
        "from support.certificates import authority, workload\n"
        "from ztunnel import tls\n"
        "def test_build():\n"
        "    times = {'not_before': time.time() - 60, 'not_after': time.time() + 600}\n"
        "    root = authority(**times)\n"
        "    leaf = workload(root, 'spiffe://cluster.local/ns/a/sa/b', **times)\n"
        "    made = tls.build([leaf.der], leaf.key_der, [root.der])\n"
        "    assert tls.context_pointer(made.server) != tls.context_pointer(made.client)\n",
        encoding="ascii",
    )
    done = subprocess.run(
        [sys.executable, str(script), "-c", str(ROOT / "pyproject.toml"), str(inner)],
        check=False,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.stdout == "unsupported\n":
        pytest.skip("this kernel has no PR_SET_MDWE")
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("refused\n")
    assert "1 passed" in done.stdout


def test_tmpfiles_are_accepted(tmp_path: Path) -> None:
    tool = shutil.which("systemd-tmpfiles")
    assert tool, "systemd-tmpfiles is missing: run `make setup`"
    configuration = ROOT / "systemd" / "nodeagent.tmpfiles.conf"
    # Names are resolved below --root as well.
    for name in ("passwd", "group"):
        target = tmp_path / "etc" / name
        target.parent.mkdir(exist_ok=True)
        shutil.copy(Path("/etc") / name, target)
    done = subprocess.run(
        [tool, "--create", f"--root={tmp_path}", str(configuration)],
        check=False,
        text=True,
        capture_output=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "etc/nodeagent/mesh.d").is_dir()
