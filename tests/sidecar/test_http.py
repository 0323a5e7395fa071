"""The HTTP side of a running sidecar: page, API, refusals."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from processes import Sidecar, program
from workers import MODEL, SITES, WIDTH, layout

from maxact_proto import stats


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    """A sidecar with two engines that nobody changes."""
    running = Sidecar(tmp_path_factory.mktemp("served") / "log", "--hold", "600")
    running.connect().send([1.0, 6e4, 3.0])
    running.connect(layout(engine="1", instance="other")).send([2.0, 5.0, 3.0])
    yield running
    running.stop()


def test_the_page_may_load_nothing_from_elsewhere(served: Sidecar) -> None:
    answer = httpx.get(served.url)
    assert answer.headers["content-type"].startswith("text/html")
    assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'unsafe-inline'")
    assert "date" in answer.headers


def test_the_api_describes_itself_without_a_documentation_page(served: Sidecar) -> None:
    paths = httpx.get(f"{served.url}/openapi.json").json()["paths"]
    assert {"/metrics", "/-/healthy", "/-/ready", "/api/v1/models", "/api/v1/cards", "/api/v1/card"} <= set(paths)
    assert httpx.get(f"{served.url}/docs").status_code == 404


def test_it_answers_everything_that_its_openapi_document_allows_as_that_says(tmp_path: Path) -> None:
    sidecar = Sidecar(tmp_path / "log", "--hold", "600")
    try:
        histogram = np.ones((len(SITES), stats.NUM_BINS), np.float32)
        for engine in ("0", "1"):
            sidecar.connect(layout(engine=engine, instance=engine)).send([1.0, 6e4, 3.0], histogram=histogram)
        sidecar.use_live_state_as_card()
        document = f"{sidecar.url}/openapi.json"
        operations = sum(len(methods) for methods in httpx.get(document).json()["paths"].values())
        command = [program("schemathesis"), "run", document, "--checks", "all", "--generation-deterministic"]
        # What is asked does not depend on chance, how often on the pace of the machine.
        command += ["--phases", "coverage,fuzzing", "--max-time", "20", "--suppress-health-check", "all"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"Tested: {operations}\n" in done.stdout
    finally:
        sidecar.stop()


@pytest.mark.parametrize("path", ["/-/healthy", "/-/ready"])
def test_it_is_healthy_and_ready(served: Sidecar, path: str) -> None:
    assert httpx.get(served.url + path).status_code == 200


def test_a_site_is_shown_with_its_phases_and_headroom(served: Sidecar) -> None:
    [site] = [each for each in served.get("sites", engine="0") if each["site"] == "hidden"]
    assert (site["model"], site["engine"], site["layer"], site["width"]) == (MODEL, "0", 0, WIDTH)
    assert (site["absmax"], site["absmax_high_water"]) == (6e4, 6e4)
    assert site["headroom"] == {"range": None, "fp16": 65504 / 6e4, "saturation": None}
    assert site["formats"] == {"int8": {"headroom_ratio": None, "sqnr_decibels": None, "zeroed_ratio": None}}
    prefill = site["phases"]["prefill"]
    assert prefill == {
        **{"tokens": 4, "absmax": 6e4, "max": 3e4, "min": -6e4, "rms": 1.5e4, "mean_abs": 7.5e3, "crest_ratio": 4.0},
        **{"nonfinite": 0, "absmax_high_water": 6e4},
    }
    decode = site["phases"]["decode"]
    assert (decode["tokens"], decode["absmax"], decode["rms"]) == (0, None, None)


def test_sites_are_filtered_by_model_and_engine(served: Sidecar) -> None:
    assert {site["engine"] for site in served.get("sites")} == {"0", "1"}
    assert {site["engine"] for site in served.get("sites", engine="1")} == {"1"}
    assert served.get("sites", model="nobody") == []


def test_a_flag_carries_its_evidence(served: Sidecar) -> None:
    [flag] = served.get("flags")
    assert {name: flag[name] for name in ("model", "engine", "layer", "site", "meaning", "phase", "active")} == {
        **{"model": MODEL, "engine": "0", "layer": 0, "site": "hidden", "meaning": "fp16"},
        **{"phase": "prefill", "active": True},
    }
    assert (flag["absmax"], flag["limit"], flag["threshold"]) == (6e4, 65504.0, 1.25)
    assert flag["headroom_ratio"] == pytest.approx(65504 / 6e4)
    assert flag["since"] == flag["last_exceeded"] == flag["first_exceeded"] > 1.7e9
    assert (flag["windows"], flag["windows_exceeded"], flag["exceeded_ratio"]) == (1, 1, 1.0)
    assert (flag["format"], flag["phases_exceeded"]) == (None, {"first": 0, "prefill": 1, "decode": 0})


def test_a_card_of_all_engines_or_of_one(served: Sidecar) -> None:
    both, one = served.get("card"), served.get("card", engine="1")
    assert (both["engine"], both["tokens"]["prefill"]) == (None, 8)
    assert (one["engine"], one["tokens"]["prefill"]) == ("1", 4)
    assert {site["site"]: site["absmax"] for site in both["sites"]}["hidden"] == 6e4
    assert {site["site"]: site["absmax"] for site in one["sites"]}["hidden"] == 5.0


def test_asking_for_the_card_of_an_unknown_engine_names_what_is_served(served: Sidecar) -> None:
    answer = httpx.get(f"{served.url}/api/v1/card", params={"engine": "7"})
    assert answer.status_code == 404
    assert MODEL in answer.json()["detail"]


def post(served: Sidecar, body: bytes) -> httpx.Response:
    return httpx.post(f"{served.url}/api/v1/cards", content=body, headers={"content-type": "application/json"})


def test_a_card_with_a_number_that_is_none_is_refused_by_name(served: Sidecar) -> None:
    card = served.get("card")
    card["sites"][0]["rms"] = math.nan
    answer = post(served, json.dumps(card).encode())
    assert answer.status_code == 422
    [problem] = answer.json()["detail"]
    assert problem["loc"] == ["body", "sites", 0, "rms"]
    assert "input" not in problem


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff", b"null"])
def test_what_is_no_card_is_refused(served: Sidecar, body: bytes) -> None:
    assert post(served, body).status_code in (400, 422)


def test_a_body_larger_than_any_card_is_refused(served: Sidecar) -> None:
    answer = httpx.post(
        f"{served.url}/api/v1/cards",
        content=(b" " * 2**20 for _ in range(65)),
        headers={"content-type": "application/json"},
        timeout=60,
    )
    assert answer.status_code == 413


def test_a_card_is_not_taken_from_a_form_of_another_site(served: Sidecar) -> None:
    card = json.dumps(served.get("card")).encode()
    answer = httpx.post(f"{served.url}/api/v1/cards", content=card, headers={"content-type": "text/plain"})
    assert answer.status_code == 422
    assert served.get("cards") == []
