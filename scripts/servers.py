"""The programs that tests drive: prometheus, promtool, alertmanager, amtool, chromium. Standard library only.

On Debian and Ubuntu packages are downloaded and unpacked beside `.venv`, which needs no root and, unlike installing
prometheus, starts no service. Only chromium, as root, is installed: it wants many libraries; and Debian's alertmanager
reads its templates from ``/usr/share`` alone, where root copies them. Elsewhere, and for what is still missing, the
tests concerned are skipped with that reason; with ``CI`` set it is an error.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Dict, List, Set

from progress import Reporter, SetupError

PACKAGES: Dict[str, str] = {
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "prometheus-alertmanager": "prometheus-alertmanager",
    "amtool": "prometheus-alertmanager",
    "chromium": "chromium",
}
"""Program -> Debian package."""

SELF_CONTAINED = {"prometheus", "prometheus-alertmanager"}
"""Packages whose programs run without any other package."""

TEMPLATES = Path("/usr/share/prometheus/alertmanager")
"""Without ``default.tmpl`` in here Debian's alertmanager does not start."""

CHROMIUM = """#!/bin/sh
LD_LIBRARY_PATH="{libraries}${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}" exec "{root}/usr/lib/chromium/chromium" "$@"
"""


def supply(venv: Path) -> None:
    """Bring in what is missing. Raises `SetupError` with ``CI`` set and something still missing."""
    unpacked = venv / "servers"
    missing = missing_packages(venv)
    if missing and shutil.which("apt-get"):
        reporter = Reporter(len(missing), venv / "setup.log")
        for package in missing:
            reporter.begin(f"{package} for the tests")
            try:
                _bring(reporter, package, unpacked)
                reporter.end()
            except SetupError as error:
                print(f"      {package}: {error} (details in .venv/setup.log)", file=sys.stderr, flush=True)
        _link(unpacked, venv / "bin")
        _place_templates(unpacked)
        shutil.rmtree(unpacked / "apt", ignore_errors=True)
        missing = missing_packages(venv)
    if missing and os.environ.get("CI"):
        raise SetupError(f"CI runs every test, but these Debian packages are missing: {', '.join(missing)}")
    if missing:
        print(f"tests that need {', '.join(missing)} will be skipped: not found here", file=sys.stderr, flush=True)


def missing_packages(venv: Path) -> List[str]:
    """Packages of which a program is neither on the path nor in `.venv`."""
    path = f"{venv / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
    missing = {package for program, package in PACKAGES.items() if not shutil.which(program, path=path)}
    return sorted(missing | ({"prometheus-alertmanager"} if lacks_templates() else set()))


def lacks_templates() -> bool:
    """Whether an alertmanager could not start for want of its templates."""
    return not (TEMPLATES / "default.tmpl").exists()


def _bring(reporter: Reporter, package: str, unpacked: Path) -> None:
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
    apt = _apt(reporter, package, unpacked, environ)
    if package in SELF_CONTAINED:
        _unpack(reporter, apt, {package}, unpacked, environ)
    elif os.geteuid() == 0:
        reporter.run([*apt, "install", "-y", "--no-install-recommends", package], env=environ)
    else:
        planned = reporter.run([*apt, "install", "--simulate", "--no-install-recommends", package], env=environ)
        _unpack(reporter, apt, needed(planned), unpacked, environ)
        _wrap_chromium(unpacked)


def _apt(reporter: Reporter, package: str, unpacked: Path, environ: Dict[str, str]) -> List[str]:
    """apt-get with package lists that know the package: images often come without, and users may not fetch them."""
    try:
        reporter.run(["apt-cache", "show", "--no-all-versions", package], env=environ)
        return ["apt-get"]
    except SetupError:
        pass
    apt = ["apt-get"]
    if os.geteuid() != 0:
        for kind in ("state/lists/partial", "cache/archives/partial"):
            (unpacked / "apt" / kind).mkdir(parents=True, exist_ok=True)
        for key, place in (("Dir::State::lists", "state/lists"), ("Dir::Cache", "cache")):
            apt += ["-o", f"{key}={unpacked / 'apt' / place}"]
    reporter.run([*apt, "update"], env=environ)
    return apt


def needed(simulated: str) -> Set[str]:
    """The packages that ``apt-get install --simulate`` would install."""
    return set(re.findall(r"^Inst (\S+)", simulated, re.MULTILINE))


def _unpack(reporter: Reporter, apt: List[str], packages: Set[str], target: Path, environ: Dict[str, str]) -> None:
    archives = target / "archives"
    archives.mkdir(parents=True, exist_ok=True)
    reporter.run([*apt, "download", *sorted(packages)], env=environ, cwd=archives)
    for archive in sorted(archives.glob("*.deb")):
        reporter.run(["dpkg", "-x", str(archive), str(target)])
    shutil.rmtree(archives)


def _link(unpacked: Path, programs: Path) -> None:
    """Unpacked programs beside those of `.venv`, without the others that came along."""
    for name in PACKAGES:
        source, link = unpacked / "usr/bin" / name, programs / name
        if source.exists() and not link.exists():
            link.symlink_to(source)


def _place_templates(unpacked: Path) -> None:
    source = unpacked / TEMPLATES.relative_to("/")
    if source.exists() and lacks_templates() and os.geteuid() == 0:
        TEMPLATES.mkdir(parents=True, exist_ok=True)
        for template in source.glob("*.tmpl"):
            shutil.copy(template, TEMPLATES)


def _wrap_chromium(root: Path) -> None:
    """Start the unpacked chromium with the unpacked libraries; the script that came with it knows only ``/usr``."""
    libraries = sorted({str(path.parent) for folder in ("lib", "usr/lib") for path in (root / folder).rglob("*.so*")})
    program = root / "usr/bin/chromium"
    program.unlink(missing_ok=True)
    program.write_text(CHROMIUM.format(libraries=":".join(libraries), root=root))
    program.chmod(0o755)
