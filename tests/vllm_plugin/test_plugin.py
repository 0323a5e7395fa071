"""From parsed flags to vLLM's ``additional_config``."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import pytest

from maxact_vllm.config import SettingsError
from maxact_vllm.plugin import add_flags, carry_flags, complete


def parse(*arguments: str, additional: Any = None) -> Any:
    """``additional_config`` of engine arguments made from a command line."""
    parser = argparse.ArgumentParser()
    add_flags(parser)
    engine_args = SimpleNamespace(additional_config=additional)
    carry_flags(parser.parse_args(arguments), engine_args)
    complete(engine_args)
    return engine_args.additional_config


def test_without_a_flag_nothing_is_carried() -> None:
    assert parse(additional=None) is None
    assert parse(additional={"other": 1}) == {"other": 1}


def test_plugin_maxact_carries_complete_settings_beside_what_others_put_there() -> None:
    carried = parse("--plugin", "maxact", "--maxact-interval", "0.5", additional={"other": 1})
    assert carried["other"] == 1
    assert carried["maxact"] == {
        "endpoint": "127.0.0.1:4471",
        "sites": "serving",
        "interval": 0.5,
        "engine": "",
    }


def test_a_flag_of_ours_asks_for_maxact() -> None:
    assert parse("--maxact-sites", "all")["maxact"]["sites"] == "all"


def test_the_environment_variable_that_names_maxact_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other, maxact")
    assert parse()["maxact"]["sites"] == "serving"
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert parse() is None


@pytest.mark.parametrize("given", [{"maxact": {"site": "all"}}, {"maxact": "all"}])
def test_bad_settings_are_refused_before_vllm_builds_its_configuration(given: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        parse(additional=given)
