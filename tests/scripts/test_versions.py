"""`make versions`: which vLLMs it runs, and what it makes of what pytest writes down."""

from __future__ import annotations

from pathlib import Path

import bootstrap
import pytest
import versions
from versions import Outcome

from maxact_vllm import canary

REPORT = """<testsuites><testsuite>
<testcase name="test_a"/>
<testcase name="test_b"><failure>why</failure></testcase>
<testcase name="test_c"><skipped/></testcase>
<testcase name="test_d"><error>why</error></testcase>
</testsuite></testsuites>"""


def test_the_window_is_what_the_plugin_says_it_was_run_with() -> None:
    minors = [version.rpartition(".")[0] for version in versions.VERSIONS]
    assert ["0.26", *sorted(minors)] == sorted(canary.RUN)  # 0.26 was run on a GPU
    assert versions.VERSIONS[0] == bootstrap.VLLM_VERSION


def test_the_files_of_tests_exist() -> None:
    assert [file for file in versions.TESTS if not (bootstrap.ROOT / file).is_file()] == []


def test_every_version_has_an_environment_of_its_own() -> None:
    places = {versions.environment(version) for version in versions.VERSIONS}
    assert len(places) == len(versions.VERSIONS)
    assert bootstrap.VENV in places


def test_failures_and_errors_both_count_as_failed(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    outcome = versions.read("0.1.0", "test_x.py", report, 2.0)
    assert outcome == Outcome("0.1.0", "test_x.py", 1, 1, ("test_x.py::test_b", "test_x.py::test_d"), 2.0)
    assert str(outcome) == "1 passed, 2 FAILED, 1 skipped"


@pytest.mark.parametrize("text", [None, "", "<testsuites/>"])
def test_a_file_that_left_no_test_behind_failed(tmp_path: Path, text: str | None) -> None:
    report = tmp_path / "report.xml"
    if text is not None:
        report.write_text(text)
    assert versions.read("0.1.0", "test_x.py", report, 2.0).failed == ("test_x.py",)


def test_the_result_adds_up_and_names_what_failed() -> None:
    outcomes = [
        Outcome("0.2.0", "a.py", 3, 0, (), 1.2),
        Outcome("0.2.0", "b.py", 1, 1, ("b.py::test_x",), 2.4),
        Outcome("0.1.0", "a.py", 3, 0, (), 1.0),
    ]
    assert versions.result(outcomes) == {
        "versions": {
            "0.2.0": {"passed": 4, "failed": 1, "skipped": 1, "seconds": 4},
            "0.1.0": {"passed": 3, "failed": 0, "skipped": 0, "seconds": 1},
        },
        "failed": ["0.2.0: b.py::test_x"],
    }
    assert versions.table(outcomes).splitlines() == [
        "      0.2.0                          0.1.0",
        "a.py  3 passed                       3 passed",
        "b.py  1 passed, 1 FAILED, 1 skipped  -",
    ]


def test_a_file_is_run_with_the_programs_of_its_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "environment", lambda version: tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(bootstrap.VENV / "bin/python")
    [outcome] = versions.run("0.1.0", ["tests/scripts/no_such_test.py"])
    assert outcome.failed == ("tests/scripts/no_such_test.py",)
    assert str(tmp_path / "bin/python") in (tmp_path / "versions.log").read_text()
