"""``maxact doctor``: says what is wrong and what to do, and nothing is wrong here."""

from __future__ import annotations

import os
import subprocess

import pytest
from processes import Sidecar, free_port, program
from workers import MODEL


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("VLLM_PLUGINS", "MAXACT_DISABLE")}
    command = [program("maxact"), "doctor", *arguments]
    return subprocess.run(command, env=clean | {"COLUMNS": "200"} | environ, capture_output=True, text=True)


def test_all_is_well_where_vllm_and_a_sidecar_are(sidecar: Sidecar) -> None:
    worker = sidecar.connect()
    done = run("--endpoint", sidecar.grpc, "--http", sidecar.url)
    worker.close()
    assert done.returncode == 0, done.stdout
    assert {line.split()[0] for line in done.stdout.splitlines()} == {"ok"}
    assert "everything the plugin wraps is where it was" in done.stdout
    assert f"{MODEL} engine 0 (1 of 1 ranks connected)" in done.stdout


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"MAXACT_DISABLE": "1"}, "MAXACT_DISABLE"),
        ({"VLLM_PLUGINS": "other"}, "add maxact or unset it"),
    ],
)
def test_what_switches_the_plugin_off_is_bad(environ: dict[str, str], said: str) -> None:
    done = run(**environ)
    assert done.returncode == 1
    [line] = [line for line in done.stdout.splitlines() if line.startswith("bad")]
    assert said in line


def test_no_sidecar_is_worth_a_note_and_how_to_start_one() -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    done = run("--endpoint", endpoint, "--http", f"http://{endpoint}")
    assert done.returncode == 0
    assert f"maxact sidecar --grpc {endpoint}" in done.stdout


def test_a_bad_address_is_named() -> None:
    done = run("--endpoint", "nowhere")
    assert done.returncode == 1
    assert "'nowhere' is not an address" in done.stdout
