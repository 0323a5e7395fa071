"""The documentation: builds without a warning, and names what exists, all of it."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path

import metrics_page
import pytest
from grafana.assets import DASHBOARDS, RECORDED, catalogue, selectors

from maxact_sidecar.families import DETAIL, FAMILIES, OWN, Family, SelfMetrics
from maxact_vllm.plugin import add_flags

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-W", "error::UserWarning", "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return folder


def test_the_site_builds_with_every_page(site: Path) -> None:
    for page in PAGES:
        assert (site / page.relative_to(DOCS)).with_suffix(".html").is_file()


def test_reading_a_page_asks_nobody_else(site: Path) -> None:
    for page in site.rglob("*.html"):
        fetched = re.findall(r'(?:src|<link[^>]* href)="(?:https?:)?//[^"]+"', page.read_text())
        assert fetched == [], page.name


def test_the_metrics_page_is_made_from_the_catalogue() -> None:
    assert (DOCS / "metrics.md").read_text() == metrics_page.render(), "run: make metrics-page"


@pytest.mark.parametrize("family", [*FAMILIES, *chain(*DETAIL.values()), *OWN], ids=lambda family: family.name)
def test_the_query_beside_a_metric_reads_it_and_labels_that_exist(family: Family) -> None:
    known = catalogue()
    found = selectors(family.example)
    assert family.name in {re.sub("_(bucket|sum|count)$", "", name) for name, _ in found}
    for name, matchers in found:
        assert set(matchers) <= known[name], name


def test_what_is_said_of_the_sidecar_itself_is_what_it_exposes() -> None:
    metrics = SelfMetrics()
    metrics.windows_rejected.labels(reason="x")
    exposed = {
        family.name + {"counter": "_total", "info": "_info"}.get(family.type, ""): (family.type, family.documentation)
        for family in metrics.registry.collect()
    }
    own = {name: exposed[name] for name in exposed if name.startswith("maxact_")}
    assert own == {family.name: (family.type, family.help) for family in OWN}
    assert {name: kind for name, (kind, _) in exposed.items() if name not in own} == {
        name: kind for name, (kind, _) in metrics_page.PROCESS.items()
    }


def test_the_metrics_page_names_every_recorded_series() -> None:
    listed = re.findall(r"^\| `(\w+:[\w:]+)` \|", (DOCS / "metrics.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(RECORDED)


def test_every_option_of_the_sidecar_is_documented() -> None:
    maxact = Path(sys.executable).with_name("maxact")
    shown = subprocess.run([maxact, "sidecar", "--help"], capture_output=True, text=True, check=True).stdout
    options = set(re.findall(r"^│ (--[a-z0-9-]+)", shown, re.MULTILINE)) - {"--help"}
    assert options
    assert options - documented_options() == set()


def test_every_flag_of_the_plugin_is_documented() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    add_flags(parser)
    flags = {option for action in parser._actions for option in action.option_strings}
    assert flags
    assert flags - documented_options() == set()


def documented_options() -> set[str]:
    return set(re.findall(r"^\| `(--[a-z0-9-]+)", (DOCS / "existing.md").read_text(), re.MULTILINE))


def test_the_dashboards_page_names_every_dashboard() -> None:
    text = (DOCS / "dashboards.md").read_text()
    for name, dashboard in DASHBOARDS.items():
        assert f"*{dashboard['title']}* (`{name}`)" in text


@pytest.mark.parametrize("page", [*PAGES, ROOT / "deploy/README.md"], ids=lambda page: page.name)
def test_paths_in_the_text_exist(page: Path) -> None:
    for path in re.findall(r"\b((?:grafana|deploy|docs)/[\w./-]+\w)", page.read_text()):
        assert (ROOT / path).exists() or path == "docs/runbooks/NAME.md", f"{page.name} names {path}"


def in_code(pattern: str) -> set[tuple[str, ...]]:
    """What a pattern finds in code blocks and code spans of all pages."""
    texts = [page.read_text() for page in (*PAGES, ROOT / "deploy/README.md")]
    code = [part for text in texts for part in re.findall(r"^    .+|`[^`\n]+`", text, re.MULTILINE)]
    return {match.groups() for part in code for match in re.finditer(pattern, part)}


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {target for (target,) in in_code(r"(?:^    |`)make ([a-z0-9-]+)")}
    assert "demo" in named
    assert named <= targets


def test_every_command_that_is_named_takes_the_options_beside_it() -> None:
    maxact = Path(sys.executable).with_name("maxact")
    commands = in_code(r"maxact (sidecar|card)\b([^`#]*)")
    assert len(commands) > 3
    for command, rest in commands:
        shown = subprocess.run([maxact, command, "--help"], capture_output=True, text=True, check=True).stdout
        for option in re.findall(r"--[a-z-]+", rest):
            assert f" {option} " in shown, f"maxact {command} {option}"
