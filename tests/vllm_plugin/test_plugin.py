"""From parsed flags to vLLM's ``additional_config``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trustme
from certificates import install, issue
from cryptography.hazmat.primitives import serialization

from maxact_vllm.config import PATHS, SettingsError, graph_key
from maxact_vllm.plugin import add_flags, carry_flags, complete

FILES = {"tls-ca": "ca.pem", "tls-cert": "cert.pem", "tls-key": "key.pem", "token-file": "token"}


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
        "tls_ca": "",
        "tls_cert": "",
        "tls_key": "",
        "token_file": "",
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


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Certificate, key and authority of a worker, a token, and files that are none of these."""
    authority = trustme.CA()
    install(tmp_path, authority, "worker")
    (tmp_path / "token").write_text("a-secret-token\n")
    (tmp_path / "words").write_text("two words\n")
    (tmp_path / "empty").write_text("# nothing\n")
    issue(tmp_path, authority, "other-", "other")
    return tmp_path


def test_of_files_only_the_names_are_carried(files: Path) -> None:
    flags = [f"--maxact-{name}={files / file}" for name, file in FILES.items()]
    carried = parse("--maxact-endpoint", "sidecar:4471", *flags)["maxact"]
    assert {name: carried[name] for name in PATHS} == {
        "tls_ca": str(files / "ca.pem"),
        "tls_cert": str(files / "cert.pem"),
        "tls_key": str(files / "key.pem"),
        "token_file": str(files / "token"),
    }
    for secret in ("a-secret-token", "BEGIN"):
        assert secret not in json.dumps(carried)


def test_files_do_not_decide_the_graph(files: Path) -> None:
    flags = [f"--maxact-{name}={files / file}" for name, file in FILES.items()]
    keys = [graph_key(parse("--maxact-endpoint", "sidecar:4471", *more)["maxact"]) for more in ([], flags)]
    assert keys[0] == keys[1]


@pytest.mark.parametrize(
    ("flag", "file", "message"),
    [
        ("tls-ca", "gone", "maxact tls_ca: {}/gone: No such file or directory"),
        ("tls-ca", "key.pem", "maxact tls_ca: {}/key.pem: holds no certificate"),
        ("tls-cert", "token", "maxact tls_cert: {}/token: holds no certificate"),
        ("tls-key", "cert.pem", "maxact tls_key: {}/cert.pem: holds no private key"),
        ("token-file", "words", "maxact token_file: {}/words: its first token is not ASCII without spaces"),
        ("token-file", "empty", "maxact token_file: {}/empty: holds no token"),
    ],
)
def test_a_file_that_cannot_work_is_an_argument_error(
    files: Path, flag: str, file: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(f"--maxact-{flag}", str(files / file))
    said = capsys.readouterr().err
    assert f"argument --maxact-{flag}: {message.replace('{}', str(files))}" in said
    assert "two words" not in said


def test_files_that_do_not_fit_are_refused_before_vllm_builds_its_configuration(files: Path) -> None:
    flags = {**FILES, "tls-key": "other-key.pem"}
    with pytest.raises(SettingsError, match="maxact tls_key: .*/other-key.pem: is not the key of .*/cert.pem"):
        parse("--maxact-endpoint", "h:1", *(f"--maxact-{name}={files / file}" for name, file in flags.items()))
    with pytest.raises(SettingsError, match="maxact tls_cert: certificate and key are needed together"):
        parse("--maxact-tls-key", str(files / "key.pem"))
    with pytest.raises(SettingsError, match="maxact tls_ca: .*/gone: No such file"):
        parse(additional={"maxact": {"tls_ca": str(files / "gone")}})


def test_an_encrypted_key_is_refused_without_a_question(files: Path) -> None:
    key = serialization.load_pem_private_key((files / "key.pem").read_bytes(), None)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
    (files / "key.pem").write_bytes(key.private_bytes(*form, serialization.BestAvailableEncryption(b"password")))
    with pytest.raises(SettingsError, match="maxact tls_key: .* is encrypted"):
        parse("--maxact-endpoint", "h:1", *(f"--maxact-{name}={files / file}" for name, file in FILES.items()))
