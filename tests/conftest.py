"""What several test folders share: a real sidecar process and the real weights."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import Sidecar

# Inductor compiles and loads a program per vector extension before it believes the processor's flags: ten seconds of
# every compiled engine.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start engines come first: the last one to end would else be a long one, with a core idle beside it."""
    items.sort(key=lambda item: item.get_closest_marker("engine") is None)


@pytest.fixture
def sidecar(tmp_path: Path) -> Iterator[Sidecar]:
    running = Sidecar(tmp_path / "sidecar.log", "--flag-hold", "0", "--hold", "1")
    yield running
    running.stop()


@pytest.fixture
def patient_sidecar(tmp_path: Path) -> Iterator[Sidecar]:
    """One that shows for long what it has seen, however slow the machine is."""
    running = Sidecar(tmp_path / "sidecar.log")
    yield running
    running.stop()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    from maxact_calibration import model

    return model.smollm2()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, random weights: for what does not depend on weights."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM as M, LlamaConfig as C; torch.manual_seed(0);"
        "M.from_config(C(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,"
        " num_key_value_heads=1, vocab_size=256)).bfloat16().save_pretrained(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", script, folder], check=True, capture_output=True)
    return folder
