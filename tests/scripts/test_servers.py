"""The programs that tests drive, where they are missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import servers
from progress import SetupError


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with no program at all, nor a package manager."""
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.delenv("CI", raising=False)
    return tmp_path / ".venv"


def test_missing_programs_are_told_and_their_tests_announced_as_skipped(
    bare: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    servers.supply(bare)
    assert capsys.readouterr().err == (
        "tests that need chromium, prometheus, prometheus-alertmanager will be skipped: not found here\n"
    )


def test_ci_skips_nothing_a_missing_program_is_an_error(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(SetupError, match=r"CI runs every test, but .*: chromium, prometheus, prometheus-alertmanager"):
        servers.supply(bare)


def test_unpacked_programs_count_as_there(bare: Path) -> None:
    programs = bare / "bin"
    programs.mkdir(parents=True)
    for name in ("prometheus", "promtool"):
        (programs / name).touch(mode=0o755)
    assert servers.missing_packages(bare) == ["chromium", "prometheus-alertmanager"]


def test_an_alertmanager_is_there_only_with_its_templates_which_root_copies(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = bare.parent / "usr/share/prometheus/alertmanager"
    monkeypatch.setattr(servers, "TEMPLATES", place)
    monkeypatch.setattr(servers.os, "geteuid", lambda: 0)
    programs = bare / "bin"
    programs.mkdir(parents=True)
    for name in servers.PACKAGES:
        (programs / name).touch(mode=0o755)
    assert servers.missing_packages(bare) == ["prometheus-alertmanager"]
    source = bare / "servers" / place.relative_to("/")
    source.mkdir(parents=True)
    (source / "default.tmpl").write_text("a template")
    servers._place_templates(bare / "servers")
    assert servers.missing_packages(bare) == []


def test_without_root_all_that_apt_would_install_is_unpacked() -> None:
    simulated = (
        "Reading package lists...\nThe following NEW packages will be installed:\n  chromium libxnvctrl0\n"
        "Inst libxnvctrl0 (525.85.05-3 Debian:12/stable [amd64])\n"
        "Inst chromium (156.0 Debian:12/stable [amd64])\nConf libxnvctrl0 (525.85.05-3 Debian:12/stable [amd64])\n"
    )
    assert servers.needed(simulated) == {"chromium", "libxnvctrl0"}
