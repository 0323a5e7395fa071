"""What several test folders share: a real sidecar process and the real weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import Sidecar


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
