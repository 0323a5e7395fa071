"""One worker's capture, from loaded model to stream: ties hops 2 to 5 together at vLLM's seams.

The seams are instance attributes of one model runner and its worker: ``load_model`` (hook the modules), the end of
warm-up (start counting), ``execute_model`` (fold the step), ``shutdown`` (send what is left). Every one of them catches
whatever we raise: serving goes on, capture switches itself off and says so once.
"""

from __future__ import annotations

import atexit
import functools
from collections.abc import Callable
from typing import Any

import torch

from maxact_proto import stats, wire
from maxact_vllm import canary, compat, logger
from maxact_vllm.buffers import allocate
from maxact_vllm.config import Settings, disown, spoil
from maxact_vllm.flush import Flusher
from maxact_vllm.fold import Folder
from maxact_vllm.instrument import Tap, in_order, instrument
from maxact_vllm.sites import find_taps
from maxact_vllm.stream import Outbox, Streamer

_MAX_FAILURES = 3


def attach(worker: Any, vllm_config: Any, carried: Any) -> None:
    """Observe the model that this worker is about to load, as ``additional_config["maxact"]`` says. Raises nothing."""
    try:
        problem = canary.of_worker(worker) or compat.unsupported(vllm_config)
        if problem:
            disown(vllm_config)
            if not getattr(worker, "rank", 0):  # one line, not one per rank
                logger.warning("maxact does not observe this engine: %s", problem)
            return
        _Seams(worker, vllm_config, Settings.from_mapping(carried)).wrap()
    except Exception:
        disown(vllm_config)
        logger.exception("maxact does not observe this engine: attaching failed")


class Capture:
    """What observes one loaded model."""

    def __init__(self, runner: Any, vllm_config: Any, settings: Settings) -> None:
        taps = _wanted_taps(runner, vllm_config, settings)
        device = torch.device(runner.device)
        buffers = allocate([tap.scale for tap in taps], compat.max_rows(vllm_config), device)
        compat.count_memory(runner, buffers.nbytes)
        instrument(taps, buffers, branch=device.type == "cuda")
        self._steps = compat.StepReader()
        self._folder = Folder(buffers)
        layout = _layout(taps, vllm_config, settings)
        outbox = Outbox(len(taps))
        self._streamer = Streamer(settings, layout, outbox)
        self._flusher = Flusher(self._folder.accumulators, buffers.histograms, layout, outbox.put)
        self._armed = False
        self._failures = 0
        logger.info(
            "maxact observes %d sites of %s (%s), windows of %g s to %s; buffers %d statistics x %d sites x %d tokens "
            "x 4 bytes, histograms %d sites x %d bins x 8 bytes: %.1f MiB",
            *(len(taps), layout.model, settings.sites, settings.interval, settings.endpoint),
            *(*buffers.block.shape, len(taps), stats.NUM_BINS, buffers.nbytes / 2**20),
        )

    def start(self) -> None:
        """Count from the next step on. Called after warm-up; what ran before is forgotten."""
        self._folder.forget()
        self._armed = True
        self._flusher.start()
        self._streamer.start()

    def before_step(self, scheduler_output: Any) -> None:
        """Choose the sample of the step that comes; on the model's thread. Raises nothing."""
        num_tokens = getattr(scheduler_output, "total_num_scheduled_tokens", 0)
        if not (self._armed and num_tokens):
            return
        try:
            self._folder.sample(num_tokens, len(scheduler_output.num_scheduled_tokens))
        except Exception:
            self._fail()

    def after_step(self, runner: Any, scheduler_output: Any) -> None:
        """Fold the step whose forward was just launched; on the model's thread. Raises nothing."""
        if not self._armed:
            return
        try:
            step = self._steps.read(runner, scheduler_output)
            if step is not None:
                self._folder.fold(step)
        except Exception:
            self._fail()

    def _fail(self) -> None:
        self._failures += 1
        if self._failures == _MAX_FAILURES:
            self._armed = False
            logger.exception("maxact switched itself off after %d errors; serving goes on", _MAX_FAILURES)

    def stop(self) -> None:
        """Stop counting and send the last window, within a second or two."""
        self._armed = False
        self._flusher.stop()
        self._streamer.stop()


class _Seams:
    """The wrapped methods of one worker and its model runner."""

    def __init__(self, worker: Any, vllm_config: Any, settings: Settings) -> None:
        self._worker = worker
        self._runner = worker.model_runner
        self._vllm_config = vllm_config
        self._settings = settings
        self._capture: Capture | None = None

    def wrap(self) -> None:
        """Replace the four methods on the instances, never on vLLM's classes."""
        _around(self._runner, "load_model", after=self._loaded)
        _around(self._runner, "execute_model", before=self._stepping, after=self._stepped)
        _around(self._worker, "compile_or_warm_up_model", after=self._warm)
        _around(self._worker, "shutdown", before=self._close)
        atexit.register(self._close)

    def _loaded(self, *args: Any, **kwargs: Any) -> None:
        self._close()
        try:
            self._capture = Capture(self._runner, self._vllm_config, self._settings)
        except Unobservable as error:
            disown(self._vllm_config)
            logger.warning("maxact does not observe this model: %s", error)
        except Exception:
            spoil(self._vllm_config)
            logger.exception("maxact does not observe this model: instrumenting failed")

    def _warm(self, *args: Any, **kwargs: Any) -> None:
        if self._capture is not None:
            try:
                self._capture.start()
            except Exception:
                logger.exception("maxact does not observe this model: starting failed")

    def _stepping(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> None:
        if self._capture is not None:
            self._capture.before_step(scheduler_output)

    def _stepped(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> None:
        if self._capture is not None:
            self._capture.after_step(self._runner, scheduler_output)

    def _close(self, *args: Any, **kwargs: Any) -> None:
        capture, self._capture = self._capture, None
        if capture is not None:
            try:
                capture.stop()
            except Exception:
                logger.exception("maxact could not stop cleanly")


class Unobservable(ValueError):
    """The model holds nothing that was asked for. The message says what was found."""


def _around(owner: Any, name: str, *, before: Callable[..., None] | None = None, after: Any = None) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(*args, **kwargs)
        result = original(*args, **kwargs)
        if after is not None:
            after(*args, **kwargs)
        return result

    setattr(owner, name, wrapped)


def _wanted_taps(runner: Any, vllm_config: Any, settings: Settings) -> list[Tap]:
    model = compat.inner_model(runner)
    config = vllm_config.model_config.hf_text_config
    found = find_taps(model, config.hidden_size, config.num_hidden_layers)
    taps = [tap for tap in found if settings.wants(tap.layer, tap.name)]
    if not found:
        tree = ", ".join(f"{name}: {type(child).__name__}" for name, child in model.named_children())
        raise Unobservable(
            f"no list of {config.num_hidden_layers} decoder layers in {type(model).__name__} ({tree}); "
            "it is served unobserved"
        )
    if not taps:
        names = sorted({tap.name for tap in found})
        raise Unobservable(f"sites {settings.sites!r} match none of {len(found)} sites ({', '.join(names)})")
    return in_order(taps)


def _layout(taps: list[Tap], vllm_config: Any, settings: Settings) -> wire.Layout:
    from maxact_vllm import __version__

    identity = compat.identity(vllm_config)
    if settings.engine:
        identity["engine"] = settings.engine
    sites = tuple(
        wire.Site(
            layer=tap.layer,
            name=tap.name,
            width=tap.width,
            sharded=tap.sharded,
            module=tap.path,
            limit=tap.scale.limit if tap.scale else None,
        )
        for tap in taps
    )
    return wire.Layout(**identity, sites=sites, interval_seconds=settings.interval, maxact_version=__version__)
