"""Settings: presets and patterns, three ways in, and errors that name the setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from maxact_vllm.config import PRESETS, Settings, SettingsError


def test_what_is_not_given_comes_from_the_environment_then_from_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAXACT_SITES", "all")
    monkeypatch.setenv("MAXACT_INTERVAL", "0.5")
    settings = Settings.from_mapping({"sites": "paper"})
    assert (settings.sites, settings.interval, settings.endpoint) == ("paper", 0.5, "127.0.0.1:4471")


def test_settings_survive_the_way_to_the_workers() -> None:
    settings = Settings(endpoint="unix:/run/maxact.sock", sites="all", interval=2.0, engine="blue")
    assert Settings.from_mapping(settings.to_mapping()) == settings


@pytest.mark.parametrize("endpoint", ["unix:/s", "127.0.0.1:1", "localhost:1", "[::1]:1"])
def test_a_token_stays_on_the_machine_without_tls(endpoint: str) -> None:
    assert Settings(endpoint=endpoint, token_file="/t").token_file == "/t"


def test_files_are_found_from_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAXACT_TOKEN_FILE", "run/token")
    settings = Settings.from_mapping({"tls_ca": "ca.pem", "endpoint": "sidecar:1"})
    assert (settings.tls_ca, settings.token_file) == (str(tmp_path / "ca.pem"), str(tmp_path / "run/token"))
    monkeypatch.chdir("/")
    assert Settings.from_mapping(settings.to_mapping()) == settings


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sites": "("}, r"maxact sites: '\(' is no preset"),
        ({"interval": 0}, "maxact interval: 0.0 is not between 0.05 and 3600 seconds"),
        ({"interval": "x"}, "interval"),
        ({"endpoint": "localhost"}, "maxact endpoint: 'localhost' is neither host:port nor unix:/path"),
        ({"endpoint": "unix:"}, "maxact endpoint"),
        ({"site": "all"}, "unknown setting 'site'; known are endpoint, sites, interval, engine"),
        ({"tls_ca": 5}, "maxact: expected str, bytes or os.PathLike object, not int"),
        ({"tls_cert": "/c", "tls_ca": "/ca"}, "maxact tls_cert: certificate and key are needed together"),
        ({"tls_cert": "/c", "tls_key": "/k"}, "maxact tls_cert: needs TLS, tls_ca"),
        ({"tls_ca": "/ca", "endpoint": "unix:/s"}, "maxact tls_ca: there is no TLS on unix:/s"),
        ({"token_file": "/t", "endpoint": "h:1"}, "maxact token_file: the token would go to h:1 unencrypted"),
        ({"token_file": "/t", "endpoint": "10.0.0.1:1"}, "maxact token_file: the token would go to"),
    ],
)
def test_a_bad_setting_is_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Settings.from_mapping(given)


@pytest.mark.parametrize(
    ("sites", "wanted"),
    [
        ("serving", {(None, "embedding"), (3, "hidden"), (3, "down_proj_input")}),
        ("paper", {(None, "embedding"), (3, "hidden"), (3, "mlp_output")}),
        (r"layers\.3\.", {(3, "hidden"), (3, "down_proj_input"), (3, "mlp_output")}),
        ("^embedding$", {(None, "embedding")}),
    ],
)
def test_presets_and_patterns_choose_sites(sites: str, wanted: set[tuple[int | None, str]]) -> None:
    candidates = {(None, "embedding"), (3, "hidden"), (3, "down_proj_input"), (3, "mlp_output")}
    settings = Settings(sites=sites)
    assert {site for site in candidates if settings.wants(*site)} == wanted


def test_serving_is_the_residual_stream_and_what_w8a8_quantizes() -> None:
    assert PRESETS["serving"] == {
        *("embedding", "hidden", "final_norm"),
        *("attn_input", "o_proj_input", "mlp_input", "down_proj_input"),
    }
