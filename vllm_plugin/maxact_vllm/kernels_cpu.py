"""Hops 2/9 and 3/9 on a CPU: builds ``kernels.cpp`` at the first start and loads it.

Built against torch's stable ABI with the compiler that Inductor uses, in about three seconds; kept beside vLLM's own
compiled artefacts, one file per source, torch version and processor.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

import torch

from maxact_vllm import compat

_SOURCE: Final = Path(__file__).with_name("kernels.cpp")
_TIMEOUT_SECONDS: Final = 120
_TORCH_2_10: Final = "0x020a000000000000"
"""The first torch with all we use of the stable ABI."""


class BuildError(RuntimeError):
    """The kernels cannot be built here. The message says why."""


def load() -> None:
    """Implement ``maxact::observe`` and ``fold`` for CPU tensors. Raises `BuildError` without a compiler that can."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise BuildError("no C++ compiler (CXX, g++ or clang++)")
    command = [compiler, *_flags()]
    library = _folder() / f"kernels-{_key(command)}.so"
    if not library.exists():
        _build(command, library)
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise BuildError(f"{library} does not load: {error.__cause__ or error}") from error


def _flags() -> list[str]:
    torch_folder = Path(torch.__file__).parent
    return [
        *("-std=c++20", "-O3", "-march=native", "-fno-trapping-math", "-shared", "-fPIC"),
        f"-DTORCH_TARGET_VERSION={_TORCH_2_10}",
        *(f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"),
    ]


def _key(command: list[str]) -> str:
    """Hash of what the library depends on; ``-march=native`` stands for the processor."""
    facts = [*command, torch.__version__, _processor(), _SOURCE.read_text()]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _folder() -> Path:
    folder = compat.cache_root() / "maxact"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _build(command: list[str], library: Path) -> None:
    """Compile to a file of our own, then rename: several workers may build at once."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder, library.name)
        # The source comes before the libraries it needs.
        arguments = [command[0], str(_SOURCE), *command[1:], "-o", str(built)]
        try:
            done = subprocess.run(arguments, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BuildError(f"{command[0]} did not run: {error}") from error
        if done.returncode != 0:
            reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:300])
            raise BuildError(f"{command[0]} failed: {reason}")
        built.replace(library)
