"""The command ``maxact`` itself."""

from __future__ import annotations

import subprocess

import pytest
from processes import program

import maxact_proto


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program("maxact"), *arguments], capture_output=True, text=True, timeout=60)


def test_the_version_is_that_of_the_distribution() -> None:
    assert _run("--version").stdout == f"{maxact_proto.__version__}\n"


def test_the_help_names_every_command_and_where_to_start() -> None:
    text = _run("--help").stdout
    assert "maxact serve MODEL" in text
    for command in ("serve", "sidecar", "card", "sites", "doctor"):
        assert f"│ {command} " in text


@pytest.mark.parametrize("command", ["serve", "sidecar", "card", "sites", "doctor"])
def test_every_command_teaches_with_an_example(command: str) -> None:
    assert f"Example: maxact {command} " in " ".join(_run(command, "--help").stdout.split())


@pytest.mark.parametrize(
    "arguments", [["serve"], ["nonsense"], ["card", "--output"], ["sidecar", "--nonsense"], ["sites"]]
)
def test_what_cannot_be_understood_ends_with_status_2_and_no_traceback(arguments: list[str]) -> None:
    done = _run(*arguments)
    assert done.returncode == 2
    assert "Error" in done.stderr
    assert "Traceback" not in done.stderr
