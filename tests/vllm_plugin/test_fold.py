"""The fold: rows of a step into running statistics; the kernel against the torch reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from engines import run_interpreted

from maxact_proto import stats
from maxact_vllm import ops
from maxact_vllm.buffers import NUM_ROWS, allocate
from maxact_vllm.compat import Requests, StaticScale, Step
from maxact_vllm.fold import Folder, phases_of, reference


def step(*requests: tuple[int, int, int]) -> Step:
    """A step of (scheduled, computed, prompt length) per request."""
    columns = Requests(*(np.array(column, np.int32) for column in zip(*requests, strict=True)))
    return Step(int(columns.scheduled.sum()), lambda: columns)


def fill(block: torch.Tensor, num_tokens: int, seed: int = 0) -> np.ndarray:
    """Write plausible rows for the first tokens, garbage behind; what was written ``[4 or 6, sites, tokens]``."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(len(block), block.shape[1], num_tokens)).astype(np.float32)
    rows[stats.MIN] = rows[stats.MAX] - 1
    rows[stats.SUM_SQUARES :] = np.abs(rows[stats.SUM_SQUARES :])
    rows[NUM_ROWS:] = rng.integers(0, 2**20, rows[NUM_ROWS:].shape)
    block[:] = 1e30
    block[:, :, :num_tokens] = torch.from_numpy(rows)
    return rows


@pytest.fixture(params=["kernel", "reference"])
def fold(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Both forms of the fold on a CPU."""
    ops.define("cpu")
    run = torch.ops.maxact.fold if request.param == "kernel" else reference

    def fold(block: torch.Tensor, num_tokens: int, phases: Any, values: torch.Tensor, counts: Any = None) -> None:
        none = torch.zeros(*values.shape[:2], 0, dtype=torch.int64)
        codes = torch.from_numpy(np.atleast_1d(np.int8(phases)))
        run(block, values, none if counts is None else counts, codes, num_tokens)

    return fold


def test_a_pure_decode_step_has_one_phase() -> None:
    assert phases_of(step((1, 7, 7), (1, 100, 3))).tolist() == [stats.DECODE]


def test_each_row_of_a_mixed_step_gets_the_phase_of_its_position() -> None:
    phases = phases_of(step((1, 9, 5), (3, 0, 3), (2, 4, 8), (3, 7, 8)))
    first, prefill, decode = stats.FIRST, stats.PREFILL, stats.DECODE
    assert list(phases) == [decode, first, prefill, prefill, prefill, prefill, prefill, decode, decode]


def test_padded_rows_behind_the_real_tokens_never_count(fold: Callable[..., None]) -> None:
    block = allocate([None] * 2, 100, torch.device("cpu")).block
    rows = fill(block, 5)
    values = torch.from_numpy(stats.empty(2))
    fold(block, 5, stats.DECODE, values)
    seen = values[stats.DECODE].numpy()
    np.testing.assert_array_equal(seen[:, stats.MAX], rows[stats.MAX].max(axis=-1))
    np.testing.assert_array_equal(seen[:, stats.MIN], rows[stats.MIN].min(axis=-1))
    np.testing.assert_allclose(seen[:, stats.SUM_SQUARES], rows[stats.SUM_SQUARES].sum(axis=-1), rtol=1e-6)
    np.testing.assert_allclose(seen[:, stats.SUM_ABS], rows[stats.SUM_ABS].sum(axis=-1), rtol=1e-6)
    np.testing.assert_array_equal(values[stats.PREFILL].numpy(), stats.empty(2)[stats.PREFILL])


def test_what_static_scales_saturate_and_zero_is_added_up_exactly(fold: Callable[..., None]) -> None:
    scale = StaticScale(limit=1.0, zero=0.1)
    block = allocate([scale, None], 100, torch.device("cpu")).block
    rows = fill(block, 90)
    counts = torch.full((len(stats.PHASES), 2, len(stats.COUNTS)), 2**53, dtype=torch.int64)
    block[stats.MAX, 1, 3] = torch.nan
    phases = np.arange(90) % 2
    fold(block, 90, phases, torch.from_numpy(stats.empty(2)), counts)
    rows[NUM_ROWS:, 1, 3] = 0
    for phase in range(2):
        added = rows[NUM_ROWS:, :, phases == phase].astype(np.int64).sum(axis=-1).T
        np.testing.assert_array_equal(counts[phase].numpy() - 2**53, added)


def test_rows_of_a_mixed_step_go_to_their_phases(fold: Callable[..., None]) -> None:
    block = allocate([None] * 2, 100, torch.device("cpu")).block
    rows = fill(block, 4)
    values = torch.from_numpy(stats.empty(2))
    fold(block, 4, [0, 1, 2, 1], values)
    for phase, columns in enumerate(([0], [1, 3], [2])):
        np.testing.assert_array_equal(values[phase, :, stats.MAX].numpy(), rows[stats.MAX][:, columns].max(axis=-1))


def test_a_row_with_a_nan_or_infinity_is_counted_and_in_no_other_column(fold: Callable[..., None]) -> None:
    block = allocate([None], 64, torch.device("cpu")).block
    rows = fill(block, 3)
    block[stats.MAX, 0, 0] = torch.nan
    block[stats.SUM_SQUARES, 0, 0] = torch.nan
    block[stats.MIN, 0, 1] = -torch.inf
    values = torch.from_numpy(stats.empty(1))
    fold(block, 3, stats.PREFILL, values)
    seen = values[stats.PREFILL, 0].numpy()
    assert seen[stats.NONFINITE] == 2
    assert seen[stats.MAX] == rows[stats.MAX, 0, 2]
    assert seen[stats.SUM_SQUARES] == rows[stats.SUM_SQUARES, 0, 2]


def test_a_site_that_does_not_run_in_a_step_adds_nothing(fold: Callable[..., None]) -> None:
    block = allocate([None], 64, torch.device("cpu")).block
    fill(block, 3)
    values = torch.from_numpy(stats.empty(1))
    fold(block, 3, stats.DECODE, values)
    once = values.clone()
    fold(block, 3, stats.DECODE, values)
    assert torch.equal(values, once)


def test_what_ran_before_forget_is_never_folded() -> None:
    ops.define("cpu")
    buffers = allocate([None] * 2, 64, torch.device("cpu"))
    folder, block = Folder(buffers), buffers.block
    fill(block, 9)
    folder.forget()
    folder.fold(step((4, 0, 4)))
    np.testing.assert_array_equal(folder.accumulators.values[0].numpy(), stats.empty(2))


def test_tokens_are_counted_per_phase() -> None:
    ops.define("cpu")
    folder = Folder(allocate([None], 64, torch.device("cpu")))
    folder.fold(step((5, 0, 5), (1, 3, 3)))
    folder.fold(step((1, 5, 5), (1, 4, 3)))
    assert folder.accumulators.tokens[0] == [1, 4, 3]


def test_a_decode_step_whose_requests_go_on_asks_for_nothing() -> None:
    ops.define("cpu")
    folder = Folder(allocate([None], 64, torch.device("cpu")))
    asked: list[int] = []

    def requests(computed: int) -> Requests:
        asked.append(computed)
        return Requests(*(np.array([each], np.int32) for each in (1, computed, 3)))

    folder.fold(Step(1, lambda: requests(2)))
    folder.fold(Step(1, lambda: requests(3), continues=True))
    folder.fold(Step(1, lambda: requests(4), continues=True))
    assert asked == [2, 3], "a prompt that is read token by token goes on, too"
    assert folder.accumulators.tokens[0] == [0, 1, 2]


@pytest.mark.timeout(300)
def test_the_triton_kernel_agrees_with_the_reference_in_tritons_interpreter() -> None:
    run_interpreted("fold_interpreted.py")
