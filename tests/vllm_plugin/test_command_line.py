"""``vllm serve MODEL --plugin maxact``, literally: the flags are vLLM's own kind of flags, and fail its own way."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from engines import ENVIRON
from processes import program

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]


def vllm(*arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, **ENVIRON}
    return subprocess.run([program("vllm"), *arguments], env=environ, capture_output=True, text=True)


def test_help_shows_the_flags() -> None:
    text = vllm("serve", "--help=all").stdout
    for flag in ("--plugin {maxact}", "--maxact-endpoint ADDR", "--maxact-sites PRESET|REGEX", "--maxact-interval S"):
        assert flag in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--plugin", "nosuch"), "argument --plugin: invalid choice: 'nosuch' (choose from 'maxact')"),
        (
            ("--plugin", "maxact", "--maxact-interval", "soon"),
            "argument --maxact-interval: maxact interval: 'soon' is not a number of seconds",
        ),
        (
            ("--plugin", "maxact", "--maxact-sites", "(hidden"),
            "argument --maxact-sites: maxact sites: '(hidden' is no preset (serving, paper, all) and no regular",
        ),
        (
            ("--maxact-tls-ca", "/no/such/ca.pem"),
            "argument --maxact-tls-ca: maxact tls_ca: /no/such/ca.pem: No such file or directory",
        ),
        (
            ("--maxact-token-file", "/dev/null"),
            "argument --maxact-token-file: maxact token_file: /dev/null: holds no token",
        ),
    ],
)
def test_a_bad_flag_is_an_argument_error_before_a_model_loads(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    done = vllm("serve", str(tmp_path / "no-such-model"), *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "no-such-model" not in done.stderr.split(message)[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--maxact-endpoint", "10.0.0.1:4471", "--maxact-token-file", "TOKEN"),
            "error: maxact token_file: the token would go to 10.0.0.1:4471 unencrypted; give tls_ca",
        ),
        (
            ("--additional-config", '{"maxact": {"interva": 5}}'),
            "error: maxact: unknown setting 'interva'; known are endpoint, sites, interval",
        ),
    ],
)
def test_settings_that_do_not_fit_together_are_an_error_before_the_model_loads(
    arguments: tuple[str, ...], message: str, tiny_llama: Path, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("secret\n")
    given = [argument.replace("TOKEN", str(token)) for argument in arguments]
    done = vllm("serve", str(tiny_llama), "--skip-tokenizer-init", *given)
    assert done.returncode == 2, done.stderr[-2000:]
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "load model" not in done.stderr + done.stdout
