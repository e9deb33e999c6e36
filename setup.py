"""The built parts: the C core, the libbpf binding, the BPF objects and the page's library.

Everything else about the distribution is in pyproject.toml. Set NODEAGENT_SANITIZE to a value of
the compiler's -fsanitize (`address,undefined`, `thread`) to build the extensions instrumented.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Extension, setup
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent

WARNINGS = [
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wshadow",
    "-Wstrict-prototypes",
    "-Wvla",
    "-Wformat=2",
    "-Wimplicit-fallthrough",
    # Callbacks of CPython, nghttp2 and libbpf have fixed signatures.
    "-Wno-unused-parameter",
]

HARDENING = [
    "-U_FORTIFY_SOURCE",
    "-D_FORTIFY_SOURCE=2",
    "-fstack-protector-strong",
    "-fstack-clash-protection",
    # Only the module's init function is visible: no symbol of ours can shadow, or be shadowed by,
    # one of the libraries that share the process.
    "-fvisibility=hidden",
]

LINK = ["-Wl,-z,relro", "-Wl,-z,now", "-Wl,-z,noexecstack", "-Wl,--no-undefined-version"]

NPM_SECONDS = 120.0
"""For two packages to arrive: a registry that hangs must not hang the build."""

BPF_ARCHITECTURES = {"x86_64": "x86", "aarch64": "arm64"}
"""Machine as uname prints it to the name that libbpf's headers expect in __TARGET_ARCH_*."""


def output(*command: str) -> str:
    """Return what `command` prints. Raises SystemExit that says what to install when it fails."""
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", "") or error
        raise SystemExit(
            f"setup.py: `{' '.join(command)}` failed: {detail}\n"
            "setup.py: `make setup` installs the compilers and libraries that the build needs"
        ) from None
    return done.stdout


def pkg_config(library: str) -> tuple[list[str], list[str]]:
    """Return compiler and linker arguments for `library`."""
    return (
        output("pkg-config", "--cflags", library).split(),
        output("pkg-config", "--libs", library).split(),
    )


def control_flow_protection() -> list[str]:
    """Return the flags that protect indirect branches on this architecture."""
    machine = os.uname().machine
    if machine == "x86_64":
        return ["-fcf-protection"]
    if machine == "aarch64":
        return ["-mbranch-protection=standard"]
    return []


def extension(name: str, sources: list[Path], library: str, headers: list[Path]) -> Extension:
    """Describe one C extension, hardened, or instrumented when NODEAGENT_SANITIZE asks for it."""
    cflags, libs = pkg_config(library)
    sanitize = os.environ.get("NODEAGENT_SANITIZE", "")
    if sanitize:
        # Assertions stay in, and _FORTIFY_SOURCE goes: the sanitizers check more than it does, and
        # cannot see through the functions that it substitutes.
        mode = [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
        mode += ["-O1", "-g", "-UNDEBUG", "-U_FORTIFY_SOURCE", "-fvisibility=hidden"]
        link = [f"-fsanitize={sanitize}"]
    else:
        mode = ["-O2", *HARDENING, *control_flow_protection()]
        link = []
    return Extension(
        name,
        sources=[str(source.relative_to(ROOT)) for source in sources],
        depends=[str(header.relative_to(ROOT)) for header in headers],
        extra_compile_args=["-std=gnu17", *WARNINGS, *mode, *cflags],
        extra_link_args=[*LINK, *link, *libs],
    )


def extensions() -> list[Extension]:
    """Return the data path's core and the binding to libbpf."""
    core = ROOT / "ztunnel" / "_core"
    binding = ROOT / "nodeagent" / "capture" / "_libbpf.c"
    return [
        extension(
            "ztunnel._core", sorted(core.glob("*.c")), "libnghttp2", sorted(core.glob("*.h"))
        ),
        extension("nodeagent.capture._libbpf", [binding], "libbpf", []),
    ]


class build_bpf(Command):  # noqa: N801 - setuptools names commands by their class
    """Compile bpf/*.bpf.c ahead of time into nodeagent/capture/bpf/, as data of that package.

    Nodes need no compiler: the objects carry BTF and are loaded by libbpf.
    """

    description = "compile the BPF programs"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = []

    def initialize_options(self) -> None:
        # setuptools sets this for editable installs; the objects go to the source tree either way.
        self.editable_mode = False

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        target = ROOT / "nodeagent" / "capture" / "bpf"
        target.mkdir(parents=True, exist_ok=True)
        headers = sorted((ROOT / "bpf").rglob("*.h"))
        for source in sorted((ROOT / "bpf").glob("*.bpf.c")):
            wanted = target / f"{source.stem}.o"
            newest = max(path.stat().st_mtime for path in [source, *headers])
            if not wanted.exists() or wanted.stat().st_mtime < newest:
                self.compile(source, wanted)

    def compile(self, source: Path, wanted: Path) -> None:
        machine = os.uname().machine
        multiarch = sysconfig.get_config_var("MULTIARCH") or f"{machine}-linux-gnu"
        # Written whole or not at all: a half-written object would look up to date next time.
        partial = wanted.with_suffix(".partial")
        output(
            "clang",
            *("-std=gnu11", "-O2", "-g", "-target", "bpf", "-mcpu=v3", "-Wall", "-Werror"),
            f"-D__TARGET_ARCH_{BPF_ARCHITECTURES.get(machine, machine)}",
            *("-I", str(ROOT / "bpf" / "include"), "-idirafter", f"/usr/include/{multiarch}"),
            # Paths in the debug information are relative: the object is the same on any machine.
            f"-fdebug-prefix-map={ROOT}=.",
            *("-c", str(source), "-o", str(partial)),
        )
        # Drops DWARF and keeps BTF, which libbpf needs for maps and CO-RE.
        output("llvm-strip", "-g", str(partial))
        partial.replace(wanted)


class build_page(Command):  # noqa: N801 - setuptools names commands by their class
    """Put the drawing library of the web page beside the page's own files, as data of the package.

    Without npm, or without its registry, the build goes on: the page then opens without drawings,
    and says so.
    """

    description = "fetch the drawing library of the web page with npm"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = []

    LIBRARY: ClassVar = {
        "dist/cytoscape.esm.min.mjs": "cytoscape.mjs",
        "LICENSE": "cytoscape.LICENSE.txt",
    }
    """Files of the npm package, and their names here."""

    def initialize_options(self) -> None:
        # setuptools sets this for editable installs; the files go to the source tree either way.
        self.editable_mode = False

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        lock = ROOT / "web" / "package-lock.json"
        package = ROOT / "web" / "node_modules" / "cytoscape"
        target = ROOT / "nodeagent" / "page" / "static" / "vendor"
        wanted = {package / name: target / known for name, known in self.LIBRARY.items()}
        oldest = min((path.stat().st_mtime for path in wanted.values() if path.exists()), default=0)
        if all(path.exists() for path in wanted.values()) and oldest >= lock.stat().st_mtime:
            return
        try:
            # Exactly what the lock file names, by its hashes; scripts of packages do not run.
            subprocess.run(
                ["npm", "ci", "--silent", "--ignore-scripts"],
                cwd=ROOT / "web",
                check=True,
                stdout=subprocess.DEVNULL,
                timeout=NPM_SECONDS,
            )
        except (OSError, subprocess.SubprocessError) as error:
            sys.stderr.write(
                f"setup.py: the web page is built without its drawing: npm ci: {error}\n"
                "setup.py: to have it, install npm, let it reach its registry, and build again\n"
            )
            return
        target.mkdir(parents=True, exist_ok=True)
        for source, path in wanted.items():
            partial = path.with_suffix(".partial")
            shutil.copyfile(source, partial)
            partial.replace(path)


class build_all(build):  # noqa: N801 - setuptools names commands by their class
    """The whole build, package data first, which build_py collects."""

    sub_commands: ClassVar = [("build_bpf", None), ("build_page", None), *build.sub_commands]


setup(
    ext_modules=extensions(),
    cmdclass={"build": build_all, "build_bpf": build_bpf, "build_page": build_page},
)
