"""docs/security.md: its numbers are those of the code, its fields the protocol's, its commands do what it says."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bcrypt
import pytest
from processes import program, wait_for
from watchers import free_port
from workers import layout, window

from maxact_proto import wire
from maxact_proto.v1 import telemetry_pb2 as pb
from maxact_sidecar import auth, fleet, http, httpserver, ingest, state
from maxact_sidecar.config import Settings, make_settings
from maxact_vllm.config import Settings as WorkerSettings
from maxact_vllm.plugin import add_flags, carry_flags, complete
from maxact_vllm.stream import Outbox, Streamer

PAGE = (Path(__file__).parents[2] / "docs/security.md").read_text()
MEBIBYTE, KIBIBYTE = 2**20, 2**10


def rows(heading: str) -> list[list[str]]:
    """Cells of the rows of the first table under a heading."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = re.findall(r"^\| (.+) \|$", section, re.MULTILINE)
    return [re.split(r" \| ", line) for line in lines[1:]]


def test_the_limits_are_those_of_the_code() -> None:
    defaults: Settings = make_settings()
    assert ingest.HANDSHAKE_SECONDS == httpserver.HANDSHAKE_SECONDS
    assert {what: limit for what, limit, _ in rows("Limits")} == {
        "message of a worker": f"{wire.MAX_MESSAGE_BYTES // MEBIBYTE} MiB",
        "sites of a worker": f"{wire.MAX_SITES:,}",
        "characters of a name": f"{wire.MAX_STRING}",
        "streams (`--max-streams`)": f"{defaults.max_streams:,}",
        "connections of workers": f"{ingest.most_connections(defaults):,}",
        "TLS handshake, both servers": f"{ingest.HANDSHAKE_SECONDS:g} s",
        "time from a stream's start to its layout": f"{ingest.LAYOUT_SECONDS:g} s",
        "gRPC connection without a stream": f"{ingest.IDLE_SECONDS:g} s",
        "ranks of an engine": f"{state._MOST_RANKS:,}",
        "engines that are gone": f"{fleet._MOST_GONE:,}",
        "HTTP connections": f"{httpserver.MAX_CONNECTIONS}",
        "time an HTTP client may keep the sidecar waiting": f"{httpserver.PATIENCE_SECONDS:g} s",
        "head of an HTTP request": f"{httpserver.MAX_HEAD_BYTES // KIBIBYTE} KiB",
        "body of an HTTP request": f"{http.MAX_BODY_BYTES // MEBIBYTE} MiB",
        "cards in use": f"{http.MOST_CARDS}",
        "series of a scrape (`--max-series`)": f"{defaults.max_series:,}",
        "logins that wait for bcrypt": f"{auth.MOST_LOGINS}",
        "cost of bcrypt": f"{auth.MOST_COST}",
    }
    assert f"closed; {ingest.SPARE_CONNECTIONS} more than streams" in PAGE
    assert f"Tokens: at least {auth.FEWEST_CHARACTERS} characters" in PAGE


@pytest.mark.parametrize(("kind", "message"), [("layout", pb.Layout), ("site", pb.Site), ("window", pb.Window)])
def test_the_fields_that_leave_the_process_are_all_listed(kind: str, message: Any) -> None:
    listed = [
        name for place, names, _ in rows("What leaves the process") if place == kind for name in names.split(", ")
    ]
    assert sorted(listed) == sorted(f"`{field.name}`" for field in message.DESCRIPTOR.fields)


def blocks(heading: str) -> list[str]:
    """Indented code under a heading, without its indentation; lines that go on are joined."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = re.findall(r"(?:^    .*\n)+", section, re.MULTILINE)
    return [re.sub(r" \\\n\s*", " ", re.sub(r"^    ", "", block, flags=re.MULTILINE)) for block in found]


def make_files(folder: Path) -> list[str]:
    """Run the commands that make certificates and tokens; the blocks of code behind them."""
    openssl, tokens, *others = blocks("TLS and certificates")
    for commands in (openssl, tokens):
        subprocess.run(["sh", "-ec", f"umask 077\n{commands}"], cwd=folder, check=True, capture_output=True)
    return others


def test_the_commands_make_a_sidecar_that_only_the_right_ones_reach(tmp_path: Path) -> None:
    serve, vllm, clients, _ = make_files(tmp_path)
    grpc, web = f"127.0.0.1:{free_port()}", f"localhost:{free_port()}"
    options = serve.replace("0.0.0.0:4471", grpc).replace("0.0.0.0:9471", web.replace("localhost", "127.0.0.1")).split()
    assert options[:2] == ["maxact", "sidecar"]
    log = tmp_path / "log"
    with (
        log.open("wb") as file,
        subprocess.Popen([program("maxact"), *options[1:]], cwd=tmp_path, stderr=file) as process,
    ):
        try:
            wait_for(lambda: "sidecar ready" in log.read_text(), 30)
            assert "WARNING" not in log.read_text()
            send_a_window_as(vllm.replace("sidecar:4471", grpc), tmp_path)
            ask(clients.replace("sidecar:9471", web), tmp_path)
        finally:
            process.terminate()


def send_a_window_as(command: str, folder: Path) -> None:
    """The worker that the documented command line of vLLM makes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    add_flags(parser)
    engine_args = SimpleNamespace(additional_config=None)
    before = os.getcwd()
    os.chdir(folder)
    try:
        carry_flags(parser.parse_args(command.split()[2:]), engine_args)
        complete(engine_args)
    finally:
        os.chdir(before)
    outbox = Outbox(3)
    streamer = Streamer(WorkerSettings(**engine_args.additional_config["maxact"]), layout(), outbox)
    streamer.start()
    outbox.put(window(0, 1.0))
    assert outbox.wait_until_sent(20)
    streamer.stop()


def ask(commands: str, folder: Path) -> None:
    """The documented clients: curl, and the command that saves a card."""
    path = f"{program('maxact').parent}:{os.environ['PATH']}"
    curl, card = (
        subprocess.run(["sh", "-ec", command], cwd=folder, capture_output=True, text=True, env={"PATH": path})
        for command in commands.strip().splitlines()
    )
    assert 'maxact_tokens_total{model_name="tiny/llama"' in curl.stdout, curl.stderr
    assert card.stdout.startswith("card.json: tiny/llama, 3 sites"), card.stderr


@pytest.mark.server
def test_prometheus_reads_the_job(tmp_path: Path) -> None:
    promtool = shutil.which("promtool", path=f"{program('maxact').parent}:{os.environ['PATH']}")
    if promtool is None:
        assert not os.environ.get("CI"), "promtool is not installed"
        pytest.skip("promtool is not installed")
    (tmp_path / "prometheus.yml").write_text(make_files(tmp_path)[-1])
    done = subprocess.run([promtool, "check", "config", tmp_path / "prometheus.yml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_sidecar_takes_the_users_of_the_page(tmp_path: Path) -> None:
    make_files(tmp_path)
    hashed = bcrypt.hashpw(b"password", bcrypt.gensalt(10, prefix=b"2b")).decode().replace("$2b$", "$2y$")
    (tmp_path / "users").write_text(f"ada:{hashed}\n")
    htpasswd, serve = blocks("Passwords, for browsers")
    assert htpasswd.split()[-2:] == ["users", "ada"]
    command = [program("maxact"), *serve.split()[1:], "--check-config"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "the configuration is right\n", done.stderr
