"""``maxact serve`` as a process: a real sidecar, and a program in vLLM's place that shows what became of it.

vLLM itself stands there in the demo and in the engine tests; here are the cases it cannot be brought into at will.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from processes import wait_for
from watchers import free_port

from maxact_calibration import serve

SERVER = """
import json, os, signal, subprocess, sys, time
worker = "import signal, time; {stubborn}; print('up', flush=True); time.sleep(100)"
child = subprocess.Popen([sys.executable, "-c", worker], stdout=subprocess.PIPE)
child.stdout.readline()
note = {{"pids": [os.getpid(), child.pid], "arguments": sys.argv[1:]}}
open({note!r} + ".new", "w").write(json.dumps(note))
os.rename({note!r} + ".new", {note!r})
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
time.sleep({seconds})
sys.exit({status})
"""
IGNORE_TERM = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"


class Serve:
    """A running ``maxact serve`` with another program in vLLM's place."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._note = folder / "note.json"
        self.http = f"127.0.0.1:{free_port()}"
        self.grpc = f"unix:{folder}/grpc.sock"
        self.process: subprocess.Popen[str] | None = None

    def start(self, *arguments: str, seconds: float = 100, status: int = 0, stubborn: str = "pass") -> None:
        """Start it; the server ends by itself after ``seconds`` with ``status``."""
        program = self._folder / "vllm"
        code = SERVER.format(note=str(self._note), seconds=seconds, status=status, stubborn=stubborn)
        program.write_text(f"#!{sys.executable}\n{code}")
        program.chmod(0o755)
        # Its own environment has a vllm beside the interpreter: only this lookup is turned to ours.
        main = (
            "from pathlib import Path; from maxact_calibration import cli, serve; own = serve._program; "
            f"serve._program = lambda name: Path({str(program)!r}) if name == 'vllm' else own(name); cli.main()"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", main, "serve", *arguments, "--http", self.http, "--grpc", self.grpc],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_until_up(self) -> dict[str, list[object]]:
        """What the server noted about itself, once it runs."""
        wait_for(self._note.exists, 30)
        noted: dict[str, list[object]] = json.loads(self._note.read_text())
        return noted

    def end(self) -> tuple[int, str]:
        """Exit status and output."""
        assert self.process is not None
        output, _ = self.process.communicate(timeout=40)
        return self.process.returncode, output

    def leftovers(self) -> list[str]:
        """Command lines of processes that still hold this test's folder or addresses."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                line = entry.joinpath("cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if (str(self._folder) in line or self.http in line) and int(entry.name) != os.getpid():
                found.append(line)
        return found


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Serve]:
    serve = Serve(tmp_path)
    yield serve
    if serve.process is not None and serve.process.poll() is None:
        serve.process.terminate()
        serve.process.communicate(timeout=60)


def _is_gone(pid: object) -> bool:
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


def test_vllm_gets_the_plugin_the_address_and_its_own_arguments_in_order(served: Serve) -> None:
    served.start("org/model", "--max-model-len", "8", "-tp", "2", "--hold", "5", "--maxact-sites", "all", "--insecure")
    assert served.wait_until_up()["arguments"] == [
        "serve",
        "org/model",
        "--plugin",
        "maxact",
        "--maxact-endpoint",
        served.grpc,
        "--max-model-len",
        "8",
        "-tp",
        "2",
        "--maxact-sites",
        "all",
    ]
    assert httpx.get(f"http://{served.http}/-/ready").is_success


def test_it_ends_with_the_servers_status_and_takes_the_sidecar_along(served: Serve) -> None:
    served.start("model", seconds=0.5, status=7)
    noted = served.wait_until_up()
    assert served.end()[0] == 7
    assert served.leftovers() == []
    assert all(_is_gone(pid) for pid in noted["pids"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopping_it_leaves_no_process_behind_not_even_a_stubborn_engine(served: Serve, number: signal.Signals) -> None:
    served.start("model", stubborn=IGNORE_TERM)
    noted = served.wait_until_up()
    assert served.process is not None
    served.process.send_signal(number)
    status, output = served.end()
    assert status == 0
    assert "Traceback" not in output
    assert served.leftovers() == []
    assert all(_is_gone(pid) for pid in noted["pids"])


def test_killed_outright_it_takes_server_and_sidecar_along(served: Serve) -> None:
    served.start("model")
    noted = served.wait_until_up()
    assert served.process is not None
    served.process.kill()
    served.process.wait()
    wait_for(lambda: _is_gone(noted["pids"][0]), 10)
    wait_for(lambda: not any("sidecar" in line for line in served.leftovers()), 10)
    os.kill(int(str(noted["pids"][1])), signal.SIGKILL)
    served.process.communicate(timeout=10)


def test_a_dead_sidecar_does_not_stop_serving(served: Serve) -> None:
    served.start("model", seconds=4, status=3)
    noted = served.wait_until_up()
    (sidecar,) = [
        int(entry.name)
        for entry in Path("/proc").glob("[0-9]*")
        if b"\0sidecar\0" in entry.joinpath("cmdline").read_bytes() and served.http in _command(entry)
    ]
    os.kill(sidecar, signal.SIGKILL)
    status, output = served.end()
    assert status == 3
    assert "maxact: the sidecar ended; vLLM goes on" in output
    assert all(_is_gone(pid) for pid in noted["pids"])


def _command(entry: Path) -> str:
    return entry.joinpath("cmdline").read_bytes().decode()


def test_a_taken_address_is_told_before_the_server_starts(served: Serve, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", int(served.http.split(":")[1]))):
        served.start("model")
        status, output = served.end()
    assert status == 2
    assert output.splitlines()[-1] == f"error: http: cannot listen on {served.http}: Address already in use"
    assert not (tmp_path / "note.json").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--port", "8000", "model"], "error: MODEL comes first, before --port: maxact serve MODEL [options]"),
        (["model", "--plugin", "maxact"], "error: --plugin: maxact serve sets this itself"),
        (["model", "--maxact-endpoint=h:1"], "error: --maxact-endpoint=h:1: maxact serve sets this itself"),
        (["model", "--hold", "soon"], "hold: Input should be a valid number"),
        (["model", "--hold", "-3"], "error: hold: Input should be greater than 0"),
        (["model", "--card", "none.json"], "error: none.json: No such file or directory"),
    ],
)
def test_bad_arguments_end_it_with_one_clear_line_and_status_2(
    served: Serve, arguments: list[str], sentence: str
) -> None:
    served.start(*arguments)
    status, output = served.end()
    assert status == 2
    assert sentence in " ".join(output.replace("│", " ").split())
    assert "Traceback" not in output


def test_options_of_the_sidecar_are_told_apart_from_vllms() -> None:
    ours, others = serve.split(["--port", "1", "--hold=2", "--stale", "3", "--insecure", "-x", "--flag-hold", "4"])
    assert ours == ["--hold=2", "--stale", "3", "--insecure", "--flag-hold", "4"]
    assert others == ["--port", "1", "-x"]
