#!/usr/bin/env python3
"""`make versions`: the tests that depend on vLLM, run with the newest vLLM maxact knows and the two minors before it.

Each vLLM has an environment of its own under `.cache/versions`, made by `bootstrap` and reused while nothing changed;
the newest is that of `.venv`. Prints what it is at, a table, and as its last line ``RESULT {json}``: per version the
tests ``passed``, ``failed`` and ``skipped``, and ``seconds``; ``failed``: their names. Status 1: one failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bootstrap import ROOT, VENV, VLLM_VERSION
from progress import Reporter, SetupError

VERSIONS = (VLLM_VERSION, "0.31.0", "0.30.0")
"""The window. `maxact_vllm.canary.RUN` names the same minors, and 0.26, which was run on a GPU."""

TESTS = (
    "tests/vllm_plugin/test_command_line.py",
    "tests/vllm_plugin/test_canary.py",
    "tests/vllm_plugin/test_inert.py",
    "tests/vllm_plugin/test_step.py",
    "tests/vllm_plugin/test_observe.py",
    "tests/vllm_plugin/test_exactness.py",
    "tests/vllm_plugin/test_modes.py",
    "tests/vllm_plugin/test_deployed_scales.py",
    "tests/vllm_plugin/test_compile_cache.py",
    "tests/vllm_plugin/test_parallel.py",
    "tests/calibration/test_doctor.py",
    "tests/calibration/test_sites.py",
    "tests/test_one_number.py",
)
"""Files of tests that touch vLLM, and the one that follows a number from a tensor to an alert."""


class Outcome(NamedTuple):
    """What one file of tests came to with one vLLM."""

    version: str
    file: str
    passed: int
    skipped: int
    failed: tuple[str, ...]
    """Names of tests; of a file that could not be run, its own."""
    seconds: float

    def __str__(self) -> str:
        parts = [f"{self.passed} passed"]
        parts += [f"{len(self.failed)} FAILED"] if self.failed else []
        parts += [f"{self.skipped} skipped"] if self.skipped else []
        return ", ".join(parts)


def environment(version: str) -> Path:
    """Where that vLLM is installed."""
    return VENV if version == VLLM_VERSION else ROOT / ".cache" / "versions" / version


def make_environment(version: str) -> None:
    """Install that vLLM, unless it is there. Raises `SetupError`."""
    command = [sys.executable, str(ROOT / "scripts" / "bootstrap.py")]
    if version != VLLM_VERSION:
        command += ["--vllm", version]
    if subprocess.run(command).returncode:
        raise SetupError(f"vLLM {version} could not be installed")


def run(version: str, files: list[str]) -> Iterator[Outcome]:
    """Run files of tests with one vLLM, one after another."""
    venv = environment(version)
    log, report = venv / "versions.log", venv / "versions.xml"
    log.unlink(missing_ok=True)
    reporter = Reporter(len(files), log)
    # Programs that tests drive (promtool) are beside the tools of `.venv`.
    path = os.pathsep.join([str(venv / "bin"), str(VENV / "bin"), os.environ.get("PATH", "")])
    for file in files:
        reporter.begin(f"vLLM {version}: {file}")
        report.unlink(missing_ok=True)
        began = time.monotonic()
        command = [str(venv / "bin/python"), "-m", "pytest", "-v", "--junit-xml", str(report), file]
        try:
            reporter.run(command, env={**os.environ, "PATH": path}, cwd=ROOT)
        except SetupError as error:
            print(f"      {error}", file=sys.stderr, flush=True)
        reporter.end()
        yield read(version, file, report, time.monotonic() - began)


def read(version: str, file: str, report: Path, seconds: float) -> Outcome:
    """The outcome that pytest wrote down; without one, the file itself failed."""
    passed, skipped, failed = 0, 0, []
    try:
        cases = xml.etree.ElementTree.parse(report).findall(".//testcase")
    except (OSError, xml.etree.ElementTree.ParseError):
        cases = []
    for case in cases:
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{file}::{case.get('name')}")
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return Outcome(version, file, passed, skipped, tuple(failed) if cases else (file,), seconds)


def table(outcomes: list[Outcome]) -> str:
    """Files down, versions across."""
    versions = list(dict.fromkeys(outcome.version for outcome in outcomes))
    files = list(dict.fromkeys(outcome.file for outcome in outcomes))
    cells = {(outcome.file, outcome.version): str(outcome) for outcome in outcomes}
    rows = [["", *versions], *([file, *(cells.get((file, version), "-") for version in versions)] for file in files)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def result(outcomes: list[Outcome]) -> dict[str, object]:
    """What the last line says."""
    by_version = {}
    for version in dict.fromkeys(outcome.version for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.version == version]
        by_version[version] = {
            "passed": sum(outcome.passed for outcome in mine),
            "failed": sum(len(outcome.failed) for outcome in mine),
            "skipped": sum(outcome.skipped for outcome in mine),
            "seconds": round(sum(outcome.seconds for outcome in mine)),
        }
    failed = [f"{outcome.version}: {name}" for outcome in outcomes for name in outcome.failed]
    return {"versions": by_version, "failed": failed}


def main() -> int:
    """Exit status: 0 all passed, 1 a test failed, 2 a version could not be installed, 130 interrupted."""
    parser = argparse.ArgumentParser(description="Run the tests that depend on vLLM with several versions of it.")
    parser.add_argument("--vllm", nargs="+", default=VERSIONS, metavar="VERSION", help="versions instead of the window")
    parser.add_argument("--tests", nargs="+", default=TESTS, metavar="FILE", help="files of tests instead of all")
    arguments = parser.parse_args()
    outcomes: list[Outcome] = []
    try:
        for version in arguments.vllm:
            make_environment(version)
            outcomes += run(version, list(arguments.tests))
    except SetupError as error:
        print(f"versions: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nversions: interrupted", file=sys.stderr)
        return 130
    failed = result(outcomes)["failed"]
    print(table(outcomes))
    if failed:
        print("What failed says why in versions.log of its environment (.cache/versions/VERSION, .venv).")
    print("RESULT", json.dumps(result(outcomes)), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
