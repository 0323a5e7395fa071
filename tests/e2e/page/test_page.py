"""The page at ``/``: what it says, that it follows the sidecar by itself, and that everybody can use it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "sidecar/maxact_sidecar/page"
SHOTS = ROOT / "test-output"
NUM_LAYERS, SITES_PER_LAYER = 12, 5

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed"),
]


def _open(browser: Any, sidecar: Any) -> None:
    browser.call("Page.navigate", url=f"{sidecar.url}/")
    browser.wait("document.getElementById('live')?.textContent === 'live'")


def _headline(text: str) -> str:
    return f"document.getElementById('headline').textContent.includes({json.dumps(text)})"


def _calibrated(sidecar: Any, engine: str = "0") -> Any:
    worker = sidecar.worker(engine=engine)
    worker.send()
    sidecar.load_card()
    worker.send()
    return worker


def test_a_raised_flag_changes_the_verdict_without_a_reload(browser: Any, sidecar: Any) -> None:
    worker = _calibrated(sidecar)
    _open(browser, sidecar)
    browser.wait(_headline("All 62 judged sites are inside their headroom"))
    browser.evaluate("window.loadedOnce = true")
    browser.screenshot(SHOTS / "page-inside.png")
    worker.send(layer_4_hidden=1800.0)
    browser.wait(_headline("1 flag raised, worst: layer 4 hidden, 20.0× the calibrated absmax since"))
    assert browser.evaluate("window.loadedOnce && document.title").startswith("▲ 1 flag")
    row = browser.evaluate("document.querySelector('#flags tbody tr').innerText").split("\t")
    assert row[1:8] == ["layer 4 hidden", "range", "first", "1.80 k", "90.0", "0.0500×", "0.9×"]
    assert row[8] == row[9] == row[10], "since, last and first exceeded"
    assert row[11:13] == ["1 of 1", "first 1"]
    worker.send()
    browser.wait("document.querySelector('#flags tbody tr').innerText.split('\t')[11] === '1 of 2'")
    browser.wait("document.getElementById('detail').textContent.includes('Exceeded in 1 of 2 windows since')")
    cells = browser.evaluate("[...document.querySelectorAll('.cell.flagged')].map(c => c.dataset.key)")
    assert cells == ["4/hidden"]
    assert browser.problems == []
    assert {url.split("?")[0] for url in browser.requests if not url.startswith("data:")} == {
        sidecar.url + path for path in ("/", "/api/v1/models", "/api/v1/sites", "/api/v1/flags", "/api/v1/cards")
    }


def test_a_site_says_what_int8_would_cost_it(browser: Any, sidecar: Any) -> None:
    _calibrated(sidecar)
    _open(browser, sidecar)
    browser.wait("document.querySelectorAll('.cell').length")
    browser.evaluate("document.querySelector('.cell[data-key=\"3/down_proj_input\"]').click()")
    facts = "document.getElementById('site-facts').textContent"
    browser.wait(f"{facts}.includes('down_proj_input')")
    # Crest factor 20: the scale is 0.157 sigma, so 26.9 dB, less 1.5 dB because two phases carry less than sigma.
    text = browser.evaluate(facts)
    assert "headroom range 1.00×, fp16" in text
    assert "resolution int8 8.58×" in text
    assert "int8 at the scale of absmax: SQNR 25.4 dB, 5.5 % zeroed" in text


def test_several_formats_stand_side_by_side_and_a_flag_names_its_own(browser: Any, two_formats: Any) -> None:
    two_formats.worker().send()
    _open(browser, two_formats)
    browser.wait("document.querySelectorAll('.cell').length")
    browser.evaluate("document.querySelector('.cell[data-key=\"3/down_proj_input\"]').click()")
    facts = "document.getElementById('site-facts').textContent"
    browser.wait(f"{facts}.includes('down_proj_input')")
    assert re.search(
        r"int8 at the scale of absmax: SQNR 2\d\.\d dB.*nvfp4 at the scale of absmax: SQNR 18\.9",
        browser.evaluate(facts),
    )
    rows = "[...document.querySelectorAll('#flags tbody tr')].map(r => r.innerText.split('\t'))"
    cells = next(row for row in browser.evaluate(rows) if row[1] == "layer 3 down_proj_input")
    assert cells[2:4] == ["resolution nvfp4", "–"], "no phase is known of a block"
    assert "1 of 1" in cells
    assert "at which nvfp4 zeroes half" in browser.evaluate("document.getElementById('headline').textContent")
    assert "block maximum" in browser.evaluate("document.getElementById('detail').textContent")
    assert browser.problems == []


def test_the_heat_map_has_one_cell_per_site_and_follows_phase_and_quantity(browser: Any, sidecar: Any) -> None:
    worker = _calibrated(sidecar)
    worker.send(layer_4_hidden=1800.0)
    _open(browser, sidecar)
    browser.wait("document.querySelectorAll('.cell').length")
    assert browser.evaluate("document.querySelectorAll('#map .grid .cell').length") == NUM_LAYERS * SITES_PER_LAYER
    assert browser.evaluate("document.querySelectorAll('#map .strip .cell').length") == 2
    cell = "document.querySelector('.cell[data-key=\"4/hidden\"]').textContent"
    shown = [browser.evaluate(cell)]
    for control in ("phase][value=prefill", "phase][value=all", "quantity][value=range", "quantity][value=fp16"):
        browser.evaluate(f"document.querySelector('[name={control}]').click()")
        shown.append(browser.evaluate(cell))
    assert shown == ["1.8k", "72", "1.8k", "0.050", "36"]
    assert browser.evaluate("document.getElementById('phase').disabled")
    colors = "new Set([...document.querySelectorAll('.cell')].map(c => c.style.background)).size"
    assert browser.evaluate(colors) > 10
    assert browser.problems == []


def test_engines_are_shown_together_or_one_by_one(browser: Any, sidecar: Any) -> None:
    _calibrated(sidecar)
    sidecar.worker(engine="1").send(layer_2_mlp_input=500.0)
    _open(browser, sidecar)
    cell = "document.querySelector('.cell[data-key=\"2/mlp_input\"]').textContent"
    browser.wait(f"{cell} === '500'")
    assert browser.evaluate("document.querySelectorAll('#ranks tbody tr').length") == 2
    choose = "const s = document.getElementById('engine'); s.value = '0'; s.dispatchEvent(new Event('change'))"
    browser.evaluate(f"{{ {choose} }}")
    browser.wait(f"{cell} === '11'")
    browser.evaluate("document.querySelector('#flags .link').click()")
    browser.wait(f"document.getElementById('engine').value === '1' && {cell} === '500'")
    assert browser.evaluate("document.getElementById('site-title').textContent") == "Layer 2 mlp_input"
    assert browser.problems == []


def test_every_control_and_cell_is_reached_with_the_keyboard(browser: Any, sidecar: Any) -> None:
    _calibrated(sidecar).send(layer_4_hidden=1800.0)
    _open(browser, sidecar)
    browser.wait("document.querySelector('#flags .link')")
    focus = "(e => e.dataset.key ?? (e.name || e.id || e.className))(document.activeElement)"
    reached = []
    for _ in range(24):
        browser.press("Tab")
        reached.append(browser.evaluate(focus))
        if reached[-1] == "0/hidden":
            break
    order = [
        name for name in reached if name in ("model", "engine", "link", "quantity", "phase", "/embedding", "0/hidden")
    ]
    assert order == ["model", "engine", "link", "quantity", "phase", "/embedding", "0/hidden"]
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft"):
        browser.press(key)
    assert browser.evaluate(focus) == "1/attn_input"
    label = browser.evaluate("document.activeElement.getAttribute('aria-label')")
    assert label == "layer 1 attn_input: absmax now 13.5"
    browser.press("Enter")
    assert browser.evaluate("document.getElementById('site-title').textContent") == "Layer 1 attn_input"
    before = len(browser.requests)
    browser.wait("new Promise(done => setTimeout(() => done(true), 2500))")
    assert len(browser.requests) > before
    assert browser.evaluate(focus) == "1/attn_input", "a poll must not take the focus away"


def test_a_phone_shows_the_page_without_sideways_scrolling(browser: Any, sidecar: Any) -> None:
    _calibrated(sidecar).send(layer_4_hidden=1800.0)
    browser.show(width=360)
    _open(browser, sidecar)
    browser.wait(_headline("layer 4 hidden"))
    browser.wait("new Promise(done => setTimeout(() => done(true), 2500))")
    assert browser.evaluate("document.documentElement.scrollWidth") == 360
    assert browser.evaluate("document.querySelectorAll('#map .grid tbody tr').length") == NUM_LAYERS
    browser.screenshot(SHOTS / "page-phone.png")
    assert browser.problems == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_follows_the_colour_scheme_of_the_system(browser: Any, sidecar: Any, scheme: str) -> None:
    worker = _calibrated(sidecar)
    browser.show(width=1280, dark=scheme == "dark")
    _open(browser, sidecar)
    browser.wait(_headline("All 62"))
    worker.send(layer_4_hidden=1800.0, layer_9_down_proj_input=70.0)
    browser.wait(_headline("2 flags"))
    browser.wait("new Promise(done => setTimeout(() => done(true), 4500))")
    color = "getComputedStyle(document.body)[{!r}].match(/\\d+/g).reduce((sum, part) => sum + Number(part), 0)"
    background, ink = (browser.evaluate(color.format(name)) for name in ("backgroundColor", "color"))
    assert (background < 150 and ink > 600) if scheme == "dark" else (background > 600 and ink < 150)
    browser.screenshot(SHOTS / f"page-{scheme}.png")
    assert browser.problems == []


def test_before_the_first_token_the_page_says_what_to_do(browser: Any, sidecar: Any) -> None:
    _open(browser, sidecar)
    assert browser.evaluate("document.getElementById('headline').textContent") == "No engine has connected yet"
    worker = sidecar.worker()
    browser.wait(_headline("No tokens seen yet: send a request"))
    assert browser.evaluate("document.querySelectorAll('.cell.empty').length") == 62
    assert f"maxact card {sidecar.url} --output CARD.json" in browser.evaluate("document.body.innerText")
    worker.send()
    browser.wait(_headline("All 62 judged sites are inside their headroom"))
    assert "Range not judged: no card loaded" in browser.evaluate("document.getElementById('detail').textContent")
    assert browser.problems == []


def test_an_absent_sidecar_is_announced_until_it_answers_again(browser: Any, sidecar: Any) -> None:
    sidecar.worker().send()
    _open(browser, sidecar)
    sidecar.stop()
    browser.wait("document.getElementById('live').textContent.startsWith('Sidecar does not answer since')")
    assert browser.evaluate("document.querySelectorAll('.cell').length") == 62, "the last answer stays"
    sidecar.start()
    browser.wait("document.getElementById('live').textContent === 'live'")
    browser.wait(_headline("No engine has connected yet"))


def test_a_hidden_page_stops_asking(browser: Any, sidecar: Any) -> None:
    _open(browser, sidecar)
    with browser.covered():
        browser.wait("document.hidden")
        time.sleep(0.5)
        before = len(browser.requests)
        time.sleep(5)
        assert len(browser.requests) == before
        assert browser.evaluate("document.getElementById('live').textContent") == "paused"
    browser.wait("document.getElementById('live').textContent === 'live'")
    assert len(browser.requests) > before


def test_strings_of_a_worker_are_never_markup(browser: Any, sidecar: Any) -> None:
    model = "<img src=x onerror=\"document.title='taken'\"><b>bold</b>"
    sidecar.worker(model=model, engine="<i>e</i>").send()
    _open(browser, sidecar)
    browser.wait(_headline("All 62"))
    assert browser.evaluate("document.getElementById('model').value") == model
    assert browser.evaluate("document.querySelectorAll('img, b').length") == 0
    assert browser.evaluate("document.querySelector('#ranks tbody td').textContent") == "<i>e</i>"
    assert browser.problems == []


def test_the_committed_page_is_built_from_the_committed_sources() -> None:
    digest = hashlib.sha256()
    sources = sorted(f"src/{path.name}" for path in (PAGE / "src").iterdir())
    for name in ["build.js", "package-lock.json", "package.json", *sources]:
        digest.update(f"{name}\n".encode() + (PAGE / name).read_bytes())
    page = (PAGE / "index.html").read_text()
    assert f"sources sha256 {digest.hexdigest()}" in page, "run `npm ci && npm run build` in the page's folder"
    assert "Copyright (c) 2022 Leon Sorokin" in page
    assert "Copyright 2010-2021 Mike Bostock" in page
