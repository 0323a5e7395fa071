"""``maxact doctor``: says what is wrong and what to do, and nothing is wrong here."""

from __future__ import annotations

import os
import re
import subprocess

from processes import Sidecar, program
from watchers import free_port
from workers import MODEL

from maxact_vllm import canary


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
    seams = " ".join(line for line in done.stdout.splitlines() if line.split()[:2] == ["ok", "seams"])
    for seam in (*canary.DOOR, *canary.PATCHED, *canary.WORKER, *canary.V1_STEP, *canary.V2_STEP):
        assert re.search(rf"\b{seam.name}\b", seams)
    assert "the plugin was run on 0.26, 0.30, 0.31, 0.32 and its seams were read in 0.26 to 0.32" in done.stdout
    assert f"{MODEL} engine 0 (1 of 1 ranks connected)" in done.stdout


def test_what_keeps_the_plugin_from_working_is_bad() -> None:
    done = run("--endpoint", "nowhere", MAXACT_DISABLE="1", VLLM_PLUGINS="other")
    assert done.returncode == 1
    bad = [line for line in done.stdout.splitlines() if line.startswith("bad")]
    for line, said in zip(
        bad, ("MAXACT_DISABLE", "add maxact or unset it", "'nowhere' is neither host:port nor unix:/path"), strict=True
    ):
        assert said in line


def test_no_sidecar_is_worth_a_note_and_how_to_start_one() -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    done = run("--endpoint", endpoint, "--http", f"http://{endpoint}")
    assert done.returncode == 0
    assert f"maxact sidecar --grpc {endpoint}" in done.stdout
