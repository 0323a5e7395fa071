"""The arrows between the packages: proto <- plugin, proto <- sidecar, and only calibration knows all of them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "maxact_proto": ROOT / "protos/maxact_proto",
    "maxact_vllm": ROOT / "vllm_plugin/maxact_vllm",
    "maxact_sidecar": ROOT / "sidecar/maxact_sidecar",
    "maxact_calibration": ROOT / "calibration/maxact_calibration",
}
MAY_IMPORT = {
    "maxact_proto": {"google", "grpc", "numpy"},
    "maxact_vllm": {"grpc", "maxact_proto", "numpy", "torch", "triton", "vllm"},
    "maxact_sidecar": {
        "bcrypt",
        "fastapi",
        "grpc",
        "maxact_proto",
        "numpy",
        "prometheus_client",
        "pydantic",
        "pythonjsonlogger",
        "starlette",
        "typer",
        "uvicorn",
        "yaml",
    },
}
"""What each package may import besides itself and the standard library; calibration may import anything."""


def _imports(package: str) -> Iterator[tuple[str, str]]:
    """(file and line, top-level name) of every import, wherever in a module it stands."""
    for path in sorted(FOLDERS[package].rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno}: relative import"
                names = [node.module or ""]
            else:
                continue
            for name in names:
                yield f"{path.relative_to(ROOT)}:{node.lineno}", name.split(".")[0]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_what_its_side_of_the_contract_allows(package: str) -> None:
    allowed = MAY_IMPORT[package] | {package} | set(sys.stdlib_module_names)
    assert [f"{place} imports {name}" for place, name in _imports(package) if name not in allowed] == []


@pytest.mark.parametrize("package", FOLDERS)
def test_nothing_imports_calibration_backwards(package: str) -> None:
    if package != "maxact_calibration":
        assert "maxact_calibration" not in {name for _, name in _imports(package)}


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import maxact_vllm", ("torch", "grpc", "vllm", "numpy")),
        ("import maxact_vllm.config, maxact_vllm.plugin", ("torch", "grpc", "vllm", "numpy")),
        ("import maxact_sidecar.cli, maxact_sidecar.run", ("torch", "vllm")),
        ("import maxact_calibration.cli, maxact_calibration.serve", ("torch", "vllm", "transformers", "grpc")),
    ],
)
def test_importing_stays_cheap(statement: str, forbidden: tuple[str, ...]) -> None:
    code = f"import sys; {statement}; print([name for name in {forbidden!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
