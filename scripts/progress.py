"""Runs one command of the set-up, shows that it is alive, keeps all it said in a log, and explains how it failed.

On a terminal one line is redrawn (step, seconds, the command's last words); elsewhere a line appears every 10 s.
Standard library only: this runs before anything is installed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

HEARTBEAT_SECONDS = 10.0

CAUSES: tuple[tuple[str, str], ...] = (
    (r"No space left on device|Disk quota exceeded", "the disk is full: free some space"),
    (
        r"407 Proxy|ProxyError|Tunnel connection failed|proxy connect|Cannot connect to proxy",
        "the proxy refused: check HTTPS_PROXY and NO_PROXY",
    ),
    (
        r"name resolution|Name or service not known|dns error|Failed to resolve|Could not resolve|getaddrinfo"
        r"|Network is unreachable|Connection refused|Failed to establish|Max retries|Could not connect"
        r"|error sending request|[Cc]onnection timed out|[Rr]ead timed out|operation timed out|Failed to fetch",
        "no package index could be reached: check the network, or give pip a mirror (pip config set global.index-url)",
    ),
    (r"Permission denied|EACCES", "no permission to write there"),
)


class SetupError(Exception):
    """What stopped the set-up, in one line for the user."""


def explain(output: str) -> str:
    """The cause of a failed command in one line, from what it printed."""
    for pattern, cause in CAUSES:
        if re.search(pattern, output):
            return cause
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"error|×|cannot|unable|No such", line, re.IGNORECASE)]
    return (errors or lines or ["it failed without a word"])[-1]


class Reporter:
    """Counts the steps of a set-up and runs their commands."""

    def __init__(self, num_steps: int, log: Path, out: IO[str] | None = None) -> None:
        self._num_steps = num_steps
        self._index = 0
        self._log = log
        self._out = out if out is not None else sys.stderr
        self._live = self._out.isatty()
        self._title = ""
        self._began = 0.0

    def begin(self, about: str) -> None:
        """Announce the next step."""
        self._index += 1
        self._title = f"[{self._index}/{self._num_steps}] {about}"
        self._began = time.monotonic()
        if not self._live:
            self._print(self._title)

    def end(self) -> None:
        """Say that the step is done, and how long it took."""
        seconds = time.monotonic() - self._began
        self._redraw("")
        self._print(f"{self._title}: done in {seconds:.1f} s" if self._live else f"      done in {seconds:.1f} s")

    def run(self, command: Sequence[str], env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
        """Run a command to its end and return what it printed. Raises `SetupError` with the cause when it fails."""
        lines: list[str] = []
        with self._log.open("a", encoding="utf-8") as log:
            print("$", *command, file=log, flush=True)
            try:
                child = subprocess.Popen(
                    command, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT, text=True, errors="replace",
                )  # fmt: skip
            except FileNotFoundError:
                raise SetupError(f"{command[0]}: no such program") from None
            reader = threading.Thread(target=_collect, args=(child.stdout, log, lines), daemon=True)
            reader.start()
            self._wait(child, lines)
            reader.join()
        output = "".join(lines)
        if child.returncode:
            raise SetupError(explain(output))
        return output

    def _wait(self, child: subprocess.Popen[str], lines: list[str]) -> None:
        heard = time.monotonic()
        while True:
            try:
                child.wait(0.2 if self._live else HEARTBEAT_SECONDS)
                return
            except subprocess.TimeoutExpired:
                last = lines[-1].strip() if lines else ""
                seconds = time.monotonic() - self._began
                if self._live:
                    self._redraw(f"{self._title}  {seconds:.0f} s  {last}")
                elif time.monotonic() - heard >= HEARTBEAT_SECONDS:
                    heard = time.monotonic()
                    self._print(f"      {seconds:.0f} s  {last[:100]}")
            except BaseException:
                child.terminate()
                child.wait()
                raise

    def _redraw(self, text: str) -> None:
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            self._out.write("\r\x1b[K" + text[:width])
            self._out.flush()

    def _print(self, text: str) -> None:
        print(text, file=self._out, flush=True)


def _collect(pipe: IO[str], log: IO[str], lines: list[str]) -> None:
    with pipe:
        for line in pipe:
            lines.append(line)
            log.write(line)
            log.flush()
