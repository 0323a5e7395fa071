"""The checked-in generated code is what the compiler makes of telemetry.proto."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROTOS = Path(__file__).parents[2] / "protos"


def test_generated_code_equals_what_is_checked_in(tmp_path: Path) -> None:
    outs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    source = "maxact_proto/v1/telemetry.proto"
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", "-I", PROTOS, *outs, source], cwd=PROTOS, check=True)
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*_pb2*"))
    assert len(made) == 3
    for path in made:
        assert (tmp_path / path).read_text() == (PROTOS / path).read_text(), f"{path}: run make proto"


def test_the_protocol_keeps_the_rules_of_buf() -> None:
    linted = subprocess.run([Path(sys.executable).with_name("buf"), "lint"], cwd=PROTOS.parent, capture_output=True)
    assert (linted.returncode, linted.stdout + linted.stderr) == (0, b"")
