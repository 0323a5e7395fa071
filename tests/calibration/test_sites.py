"""``maxact sites``: the table, without weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from processes import program

pytestmark = [pytest.mark.engine, pytest.mark.timeout(200)]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run([program("maxact"), "sites", *arguments], env=environ, capture_output=True, text=True)


@pytest.fixture(scope="module")
def bare(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Only the configuration of SmolLM2: nothing to read weights from."""
    folder = tmp_path_factory.mktemp("bare")
    shutil.copy(smollm2 / "config.json", folder)
    return folder


def test_layers_that_are_alike_share_a_line_and_no_weights_are_needed(bare: Path) -> None:
    done = run(str(bare))
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.replace("│", " ").split())
    assert "302 sites" in text
    assert "down_proj_input 0-29 1,536 serving input of" in text
    assert "hidden 0-28 576 serving, paper residual of" in text


def test_each_lists_every_layer(bare: Path) -> None:
    lines = [line for line in run(str(bare), "--each").stdout.splitlines() if "mlp_output" in line]
    assert len(lines) == 30


def test_a_model_without_layers_would_be_served_unobserved(bare: Path, tmp_path: Path) -> None:
    config = json.loads((bare / "config.json").read_text()) | {"num_hidden_layers": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = run(str(tmp_path))
    assert done.returncode == 2
    assert "it would be served unobserved" in done.stderr


def test_a_folder_that_is_not_there_is_one_line() -> None:
    done = run("/no/such/folder")
    assert done.returncode == 2
    assert done.stderr == "error: /no/such/folder: no such folder\n"


def test_a_folder_without_a_model_is_one_line(tmp_path: Path) -> None:
    done = run(str(tmp_path))
    assert done.returncode == 2
    assert f"error: {tmp_path}: vLLM cannot build it: " in done.stderr
    assert "Traceback" not in done.stderr
