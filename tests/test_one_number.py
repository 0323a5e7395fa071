"""One planted extreme value, followed hop by hop from a tensor to a firing alert. README draws the same hops."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from processes import Sidecar
from prometheus_client.parser import text_string_to_metric_families
from torch import nn

from maxact_proto import stats, wire
from maxact_proto.v1 import telemetry_pb2 as pb
from maxact_vllm.buffers import allocate
from maxact_vllm.compat import Requests, Step
from maxact_vllm.config import Settings
from maxact_vllm.flush import Flusher
from maxact_vllm.fold import Folder
from maxact_vllm.instrument import Tap, instrument
from maxact_vllm.stream import Outbox, Streamer

ROOT = Path(__file__).parents[1]
PLANTED = -23_040.0
"""Exact in bfloat16, and negative: the largest magnitude is not the largest value."""
LAYER, TOKEN, WIDTH, PADDED = 11, 2, 576, 8


class Residual(nn.Module):
    """Something with an output to observe."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 1


def run_step(module: nn.Module, folder: Folder, planted: float) -> None:
    """One prefill step of 6 tokens in a batch padded to 8; the padding holds something larger than all of them."""
    x = torch.randn(PADDED, WIDTH).bfloat16()
    x[TOKEN, 507] = planted
    x[6:] = 1e6
    module(x)
    folder.fold(Step(6, lambda: Requests(np.array([6]), np.array([0]), np.array([6]))))


@pytest.mark.server
def test_a_planted_value_arrives_unchanged_at_every_hop(  # noqa: PLR0915  (the whole way is its point)
    patient_sidecar: Sidecar, tmp_path: Path
) -> None:
    sidecar = patient_sidecar
    # Hop 1: the table says which column an extreme lands in.
    assert stats.STATS[stats.MIN].name == "min"
    assert stats.STATS[stats.MIN].merge == "min"

    # Hop 2: tensor -> row of the site, one float per token and statistic.
    module = Residual()
    buffers = allocate([None], 64, torch.device("cpu"))
    block = buffers.block
    tap = Tap(layer=LAYER, name="hidden", path="layers.12.norm", module=module, reads="output", width=WIDTH)
    instrument([tap], buffers, branch=False)
    folder = Folder(buffers)
    outbox = Outbox(1)
    site = wire.Site(layer=LAYER, name="hidden", width=WIDTH, sharded=False)
    layout = wire.Layout(model="one-number", engine="0", instance="test", sites=(site,), interval_seconds=3600.0)
    flusher = Flusher(folder.accumulators, buffers.histograms, layout, outbox.put)
    streamer = Streamer(Settings(endpoint=sidecar.grpc), layout, outbox)
    streamer.start()

    # Ordinary traffic first: its card is what the planted value will be judged against.
    run_step(module, folder, planted=5.0)
    outbox.put(flusher.close_window())
    assert outbox.wait_until_sent(10)
    card = sidecar.get("card")
    httpx.post(f"{sidecar.url}/api/v1/cards", json=card).raise_for_status()

    x = torch.zeros(1, WIDTH).bfloat16()
    x[0, 507] = PLANTED
    module(x)
    assert block[stats.MIN, 0, 0] == PLANTED

    # Hop 3: rows -> running statistics; the padded rows are cut, the phase is known.
    run_step(module, folder, planted=PLANTED)
    running = folder.accumulators.values[folder.accumulators.active]
    assert running[stats.PREFILL, 0, stats.MIN] == PLANTED
    assert running[stats.PREFILL, 0, stats.MAX] < 10
    assert running[stats.FIRST, 0, stats.MIN] > -10

    # Hop 4: the window closes.
    window = flusher.close_window()
    assert window.values[stats.PREFILL, 0, stats.MIN] == PLANTED
    assert window.tokens == (1, 5, 0)

    # Hop 6: dataclass -> bytes -> dataclass (asserted here, used by hop 5 below).
    sent = wire.encode_window(dataclasses.replace(window, sequence=9))
    decoded = wire.decode_window(pb.StreamRequest.FromString(sent.SerializeToString()).window, 1)
    assert decoded.values[stats.PREFILL, 0, stats.MIN] == PLANTED

    # Hop 5: over a real stream, acknowledged.
    outbox.put(window)
    assert outbox.wait_until_sent(10)

    # Hop 7: merged.
    [view] = sidecar.get("sites")
    assert view["phases"]["prefill"]["min"] == PLANTED
    assert view["absmax"] == view["absmax_high_water"] == -PLANTED

    # Hop 8: judged and exposed.
    limit = max(entry["absmax"] for entry in card["sites"])
    [flag] = [flag for flag in sidecar.get("flags") if flag["active"]]
    assert (flag["layer"], flag["site"], flag["phase"], flag["absmax"]) == (LAYER, "hidden", "prefill", -PLANTED)
    assert flag["headroom_ratio"] == limit / -PLANTED
    scrape = sidecar.scrape()
    samples = {
        (sample.name, sample.labels.get("phase", ""), sample.labels.get("meaning", "")): sample
        for family in text_string_to_metric_families(scrape)
        for sample in family.samples
    }
    assert samples["maxact_absmax", "prefill", ""].value == -PLANTED
    assert samples["maxact_min", "prefill", ""].value == PLANTED
    assert samples["maxact_headroom_flag", "", "range"].value == 1
    streamer.stop()
    flusher.stop()

    # Hop 9: the rule fires on exactly these series, and says the value.
    fires = promtool(scrape, tmp_path)
    assert "absmax 2.304e+04" in fires
    assert f"calibrated absmax {limit:.4g}" in fires
    assert "layer 11 hidden" in fires


def promtool(scrape: str, folder: Path) -> str:
    """What MaxactRangeExceeded says when Prometheus sees this scrape, through ``promtool test rules``."""
    series = [
        {"series": f'{name}{{{labels},job="maxact",instance="s"}}', "values": f"{value}x5"}
        for name, labels, value in (split(line) for line in scrape.splitlines() if line.startswith("maxact_"))
        if labels
    ]
    series += [{"series": 'up{job="maxact",instance="s"}', "values": "1x5"}]
    test = {
        "rule_files": [str(ROOT / "grafana/rules/maxact.rules.yaml")],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": series,
                # Expecting silence: promtool then prints what fired instead.
                "alert_rule_test": [{"eval_time": "3m", "alertname": "MaxactRangeExceeded"}],
            }
        ],
    }
    path = folder / "one_number.json"
    path.write_text(json.dumps(test))
    done = subprocess.run(["promtool", "test", "rules", path], capture_output=True, text=True)
    assert done.returncode == 1, "the alert did not fire"
    return done.stdout + done.stderr


def split(line: str) -> tuple[str, str, str]:
    """(name, labels, value) of a sample line."""
    head, _, value = line.rpartition(" ")
    name, _, labels = head.partition("{")
    return name, labels.removesuffix("}"), value
