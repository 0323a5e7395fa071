"""The programs that tests drive: prometheus, promtool, alertmanager, amtool, chromium. Standard library only.

Debian and Ubuntu as root: apt-get. There without root the packages that need no others are unpacked beside `.venv`.
Elsewhere, and for what is still missing, the tests concerned are skipped with that reason; with ``CI`` set it is an
error.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Dict, List

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


def supply(venv: Path) -> None:
    """Bring in what is missing. Raises `SetupError` with ``CI`` set and something still missing."""
    unpacked = venv / "servers"
    missing = missing_packages(unpacked)
    if missing and shutil.which("apt-get"):
        reporter = Reporter(1, venv / "setup.log")
        reporter.begin(f"{', '.join(missing)} for the tests")
        try:
            if os.geteuid() == 0:
                _install(reporter, missing)
            else:
                _unpack(reporter, [name for name in missing if name in SELF_CONTAINED], unpacked)
        except SetupError as error:
            print(f"      {error}", file=sys.stderr, flush=True)
        reporter.end()
        missing = missing_packages(unpacked)
    if missing and os.environ.get("CI"):
        raise SetupError(f"CI runs every test, but these Debian packages are missing: {', '.join(missing)}")
    if missing:
        print(f"tests that need {', '.join(missing)} will be skipped: not found here", file=sys.stderr, flush=True)


def missing_packages(unpacked: Path) -> List[str]:
    """Packages of which a program is neither on the path nor unpacked."""
    path = f"{unpacked / 'usr/bin'}{os.pathsep}{os.environ.get('PATH', '')}"
    return sorted({package for program, package in PACKAGES.items() if not shutil.which(program, path=path)})


def _install(reporter: Reporter, packages: List[str]) -> None:
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "-y", "--no-install-recommends", *packages]
    try:
        reporter.run(install, env=environ)
    except SetupError:  # package lists are often absent in images, or old
        reporter.run(["apt-get", "update"], env=environ)
        reporter.run(install, env=environ)


def _unpack(reporter: Reporter, packages: List[str], target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    reporter.run(["apt-get", "download", *packages], cwd=target)
    for archive in sorted(target.glob("*.deb")):
        subprocess.run(["dpkg", "-x", str(archive), str(target)], check=True)
