"""README, CONTRIBUTING and CHANGELOG name what exists: hops, files, flags, make targets, versions."""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
from pathlib import Path

import pytest
from processes import program

import maxact_proto
from maxact_vllm.plugin import add_flags

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PROSE = README + (ROOT / "CONTRIBUTING.md").read_text()

HOPS = [
    (int(hop), path)
    for hop, cell in re.findall(r"^\| (\d) \| ([^|]+) \|", README, re.MULTILINE)
    for path in re.findall(r"`([^`]+)`", cell)
]


def test_the_hop_table_counts_from_one_to_nine() -> None:
    assert sorted({hop for hop, _ in HOPS}) == list(range(1, 10))


@pytest.mark.parametrize(("hop", "path"), HOPS)
def test_every_file_of_the_hop_table_exists_and_says_which_hop_it_is(hop: int, path: str) -> None:
    text = (ROOT / path).read_text()
    first = (ast.get_docstring(ast.parse(text)) or "") if path.endswith(".py") else text.lstrip("# ")
    assert first.startswith(f"Hop {hop}/9"), f"{path} begins: {first[:60]}"


def test_no_module_claims_a_hop_the_table_gives_to_another() -> None:
    beside = {str(Path(path).parent): set() for _, path in HOPS}
    for hop, path in HOPS:
        beside[str(Path(path).parent)].add(hop)
    for folder, hops in beside.items():
        for module in (ROOT / folder).glob("*.py"):
            claimed = re.match(r"Hop (\d)/9", ast.get_docstring(ast.parse(module.read_text())) or "")
            assert claimed is None or int(claimed[1]) in hops, module


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([^)#:]+)\)", PROSE))))
def test_every_linked_file_exists(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:tests|scripts|protos|vllm_plugin)/[\w./]+)`", PROSE))))
def test_every_named_file_exists(path: str) -> None:
    assert (ROOT / path).exists()


def test_every_make_target_in_the_text_exists() -> None:
    named = set(re.findall(r"(?:`|^    )make ([a-z]+(?:-[a-z]+)*)", PROSE, re.MULTILINE))
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {"demo", "test", "check"} <= named
    assert named <= {line.split()[0] for line in listed.splitlines()}


def _options(command: str) -> str:
    return subprocess.run([program("maxact"), command, "--help"], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("command", "options"),
    sorted({(command, option) for command, line in re.findall(r"maxact (sidecar|card|serve)([^\n`]*)", README)
            for option in re.findall(r"--[a-z-]+", line)}),
)  # fmt: skip
def test_every_option_of_maxact_in_the_readme_exists(command: str, options: str) -> None:
    if (command, options) != ("serve", "--plugin"):  # vLLM's, in the comment
        assert options in _options(command)


def test_every_flag_of_vllm_in_the_readme_exists() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    for line in re.findall(r"vllm serve MODEL([^\n`]*)", README):
        for flag in re.findall(r"--[a-z-]+", line):
            assert flag in parser.format_help()


def test_the_changelog_tells_of_this_version_or_what_comes_next() -> None:
    sections = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert sections[0] == "Unreleased" or sections[0] == maxact_proto.__version__
