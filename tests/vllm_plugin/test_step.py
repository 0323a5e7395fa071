"""What a step says of itself: vLLM's own scheduler output, read after a forward."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput

from maxact_vllm.compat import StepReader

RUNNER = SimpleNamespace(
    input_batch=SimpleNamespace(
        num_reqs=2,
        req_ids=["a", "b"],
        num_computed_tokens_cpu=np.array([7, 3, 0], np.int32),
        num_prompt_tokens=np.array([5, 9, 0], np.int32),
    )
)
"""Stands for a V1 runner that holds two requests."""


def scheduled(rows: dict[str, int], *, resumed: tuple[str, ...] = (), new: tuple[int, ...] = ()) -> SchedulerOutput:
    """A step of ``rows`` of each request; ``new``: cached tokens of those that start."""
    output = SchedulerOutput.make_empty()
    running = CachedRequestData.make_empty()
    running.req_ids, running.num_computed_tokens = list(rows), [48] * len(rows)
    running.resumed_req_ids = set(resumed)
    output.scheduled_cached_reqs = running
    output.scheduled_new_reqs = [SimpleNamespace(num_computed_tokens=cached) for cached in new]  # type: ignore[misc]
    output.num_scheduled_tokens, output.total_num_scheduled_tokens = rows, sum(rows.values())
    return output


def test_requests_go_on_where_none_starts_and_each_has_as_many_rows() -> None:
    reader = StepReader()
    steps = (
        scheduled({"a": 1, "b": 1}),
        scheduled({"a": 1, "b": 1}),
        scheduled({"a": 1, "b": 1}, resumed=("b",)),
        scheduled({"a": 1, "c": 1}),
        scheduled({"a": 1, "c": 2}),
        scheduled({"a": 1, "c": 2}),
        scheduled({"a": 1}),
        scheduled({"a": 1}, new=(0,)),
    )
    continues = [step.continues for output in steps if (step := reader.read(RUNNER, output))]
    assert continues == [False, True, False, False, False, True, False, False]


def test_a_step_knows_its_rows_its_requests_and_what_was_cached() -> None:
    step = StepReader().read(RUNNER, scheduled({"b": 4, "a": 1}, resumed=("b",), new=(16,)))
    assert step
    assert (step.num_tokens, step.cached) == (5, 64)
    assert [column.tolist() for column in step.requests()] == [[1, 4], [7, 3], [5, 9]]


def test_without_tokens_there_is_no_step() -> None:
    assert StepReader().read(RUNNER, SchedulerOutput.make_empty()) is None
