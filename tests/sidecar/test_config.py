"""Settings from a file, variables and options; what is wrong is named with file and line; SIGHUP reads again."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from processes import Sidecar, program, wait_for

from maxact_sidecar.config import ConfigError, Settings, make_settings
from maxact_sidecar.configfile import read_settings
from maxact_sidecar.headroom import Criterion


def written(folder: Path, text: str) -> Path:
    path = folder / "sidecar.yaml"
    path.write_text(text)
    return path


def refused(folder: Path, text: str) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        read_settings(written(folder, text), {})
    return str(raised.value).replace(f"{folder}/", "").splitlines()


def test_a_file_fills_in_what_is_not_given(tmp_path: Path) -> None:
    path = written(tmp_path, "hold: 12\nrange_threshold: 0.5\ncards: [a.json, tiny=b.json]\n")
    settings = read_settings(path, {"hold": "20"})
    assert (settings.hold, settings.range_threshold, settings.stale) == (20.0, 0.5, 60.0)
    assert [(card.path.name, card.model) for card in settings.cards] == [("a.json", None), ("b.json", "tiny")]


@pytest.mark.parametrize("text", ["", "# nothing yet\n"])
def test_an_empty_file_is_all_defaults(tmp_path: Path, text: str) -> None:
    assert read_settings(written(tmp_path, text), {}) == Settings()


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("hold: 1\nflag_hlod: 2\n", ["sidecar.yaml:2: flag_hlod: is not a setting; did you mean flag_hold?"]),
        ("hold: 1\nstale: 2\nhold: 3\n", ["sidecar.yaml:3: hold: is set twice"]),
        ("stale: 2\nhold: 0\n", ["sidecar.yaml:2: hold: Input should be greater than 0"]),
        ("hold: .nan\n", ["sidecar.yaml:1: hold: Input should be a finite number"]),
        ("cards:\n- a.json\n- 7\n", ["sidecar.yaml:3: cards[1]: 7 is not a card; write FILE or MODEL=FILE"]),
        ("hold: 1\n  stale: 2\n", ["sidecar.yaml:2: is not YAML: mapping values are not allowed here"]),
        ("- hold\n", ["sidecar.yaml:1: is not a mapping of settings; write lines like hold: 30"]),
        (
            "formats: [int8, int9]\n",
            ["sidecar.yaml:1: formats: 'int9' is not a format; formats are int8, int4, fp8_e4m3, fp8_e5m2, nvfp4"],
        ),
        (
            "resolution_threshold: {int4: low}\n",
            [
                "sidecar.yaml:1: resolution_threshold: {'int4': 'low'} is no ratio; write R for all formats, or "
                "FORMAT=R,FORMAT=R"
            ],
        ),
        ("resolution_threshold: 0\n", ["sidecar.yaml:1: resolution_threshold: 0 is not above 0"]),
        (
            "max_series: many\nmax_streams: 0\n",
            [
                "sidecar.yaml:1: max_series: Input should be a valid integer, unable to parse string as an integer",
                "sidecar.yaml:2: max_streams: Input should be greater than or equal to 1",
            ],
        ),
    ],
)
def test_what_is_wrong_is_named_with_file_and_line(tmp_path: Path, text: str, problems: list[str]) -> None:
    assert refused(tmp_path, text) == problems


@pytest.mark.parametrize("given", ["2,int4=0.5", "int8", "", "nan", "-1", "int8=", "fp16=2", "inf"])
def test_a_threshold_that_is_none_is_refused(given: str) -> None:
    with pytest.raises(ConfigError, match="resolution_threshold: "):
        make_settings(resolution_threshold=given)


@pytest.mark.parametrize(
    ("given", "expected"),
    [("2", (2.0, 2.0)), (3, (3.0, 3.0)), ("int4=0.5", (1.0, 0.5)), ({"int8": 2, "int4": "4"}, (2.0, 4.0))],
)
def test_resolution_has_a_threshold_for_all_formats_or_for_each(given: Any, expected: tuple[float, float]) -> None:
    settings = make_settings(formats="int8, int4", resolution_threshold=given)
    assert settings.formats == ("int8", "int4")
    ratios = {each.format: threshold.raise_below for each, threshold in settings.thresholds.items() if each.format}
    assert (ratios["int8"], ratios["int4"]) == expected
    clear = settings.thresholds[Criterion("resolution", "int4")].clear_at
    assert clear == 1.25 * expected[1], "the hysteresis scales with the threshold"


def test_no_format_at_all_may_be_judged() -> None:
    assert [each.meaning for each in make_settings(formats=[]).thresholds] == ["range", "fp16", "saturation"]


def test_a_key_like_no_other_lists_those_that_exist(tmp_path: Path) -> None:
    [line] = refused(tmp_path, "xyzzy: 1\n")
    assert line.startswith("sidecar.yaml:1: xyzzy: is not a setting; settings are grpc, http, cards, ")


def test_a_wrong_option_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        read_settings(written(tmp_path, "hold: 5\n"), {"hold": "-1"})
    assert str(raised.value) == "hold: Input should be greater than 0"


def check(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [program("maxact"), "sidecar", "--check-config", *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


def test_a_configuration_is_checked_without_serving(tmp_path: Path) -> None:
    path = written(tmp_path, "hold: 5\n")
    right = check("--config", str(path))
    assert (right.returncode, right.stdout, right.stderr) == (0, "the configuration is right\n", "")
    wrong = check("--config", str(path), "--card", "/nowhere/card.json")
    assert (wrong.returncode, wrong.stderr) == (2, "error: /nowhere/card.json: No such file or directory\n")
    missing = check("--config", "/nowhere/sidecar.yaml")
    assert missing.stderr == "error: config: /nowhere/sidecar.yaml: No such file or directory\n"


def test_variables_come_before_the_file_and_after_options(tmp_path: Path) -> None:
    path = str(written(tmp_path, "hold: nonsense\n"))
    assert check("--config", path).returncode == 2
    assert check("--config", path, MAXACT_SIDECAR_HOLD="5").returncode == 0
    assert check(MAXACT_SIDECAR_CONFIG=path).returncode == 2
    assert "hold" in check("--config", path, "--hold", "-1", MAXACT_SIDECAR_HOLD="5").stderr
    assert check("--http", "0.0.0.0:9471", MAXACT_SIDECAR_INSECURE="1").returncode == 0


def logged(sidecar: Sidecar, start: str) -> dict[str, Any]:
    """The newest line of the log whose message starts so."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in sidecar.log.read_text().splitlines()]
    return [line for line in lines if line["message"].startswith(start)][-1]


def reload(sidecar: Sidecar, answer: str) -> None:
    before = sidecar.log.read_text().count(answer)
    sidecar.signal(signal.SIGHUP)
    wait_for(lambda: sidecar.log.read_text().count(answer) > before, 10)


def test_thresholds_and_cards_are_reloaded(tmp_path: Path) -> None:
    path = written(tmp_path, "fp16_threshold: 1.25\nhold: 60\n")
    sidecar = Sidecar(tmp_path / "log", "--config", str(path))
    try:
        sidecar.connect().send([1.0, 4e4, 2.0])
        assert sidecar.get("flags") == []
        (tmp_path / "calm.json").write_text(httpx.get(f"{sidecar.url}/api/v1/card").text)
        written(tmp_path, f"fp16_threshold: 2\nhold: 30\ncards: [{tmp_path}/calm.json]\n")
        reload(sidecar, '"reloaded"')
        [flag] = sidecar.get("flags")
        assert (flag["meaning"], flag["site"], flag["threshold"]) == ("fp16", "hidden", 2.0)
        assert 'maxact_headroom_threshold_ratio{meaning="fp16"} 2' in sidecar.scrape()
        assert [card["name"] for card in sidecar.get("cards")] == ["calm"]
        assert logged(sidecar, "needs a restart")["settings"] == "hold"
        raised = logged(sidecar, "flag raised")
        assert (raised["levelname"], raised["site"], raised["layer"], raised["threshold"]) == (
            "WARNING",
            "hidden",
            0,
            2.0,
        )
    finally:
        sidecar.stop()


def test_formats_stay_until_a_restart_and_their_thresholds_do_not(tmp_path: Path) -> None:
    path = written(tmp_path, "formats: [int4]\nhold: 60\n")
    sidecar = Sidecar(tmp_path / "log", "--config", str(path))
    try:
        sidecar.connect().send(1.0)
        written(tmp_path, "formats: [int8]\nhold: 60\nresolution_threshold: {int4: 0.5, int8: 3}\n")
        reload(sidecar, '"reloaded"')
        assert logged(sidecar, "needs a restart")["settings"] == "formats"
        shown = [line for line in sidecar.scrape().splitlines() if "threshold_ratio{" in line and "format=" in line]
        assert shown == ['maxact_headroom_threshold_ratio{meaning="resolution",format="int4"} 0.5']
    finally:
        sidecar.stop()


def test_a_reload_of_something_wrong_changes_nothing(tmp_path: Path) -> None:
    path = written(tmp_path, "fp16_threshold: 1.25\n")
    sidecar = Sidecar(tmp_path / "log", "--config", str(path))
    try:
        written(tmp_path, "fp16_threshold: 9\nfp16_threshhold: 3\n")
        reload(sidecar, "not reloaded")
        assert logged(sidecar, "not reloaded")["reason"].startswith(f"{path}:2: fp16_threshhold: is not a setting")
        assert 'maxact_headroom_threshold_ratio{meaning="fp16"} 1.25' in sidecar.scrape()
    finally:
        sidecar.stop()


def test_it_drains_within_five_seconds_of_sigterm(sidecar: Sidecar) -> None:
    sidecar.connect().send(1.0)
    started = time.monotonic()
    sidecar.signal(signal.SIGTERM)
    assert sidecar.stop() == 0
    assert time.monotonic() - started < 5
