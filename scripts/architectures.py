"""``make architectures``: serves a tiny random checkpoint of every architecture and writes docs/architectures.md.

Per architecture two processes, one after another, each with a time limit: vLLM's native eager mode against plain
forward hooks, then vLLM compiled against native (`architecture_run`). Results are kept in a cache folder, one JSON per
run: started again, only what is missing runs. ``--only PATTERN`` narrows down, ``--again`` forgets, ``--page`` only
writes the page.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import architecture_page
from architecture_models import Recipe, make_checkpoint, recipes

ROOT: Final = Path(__file__).resolve().parents[1]
CACHE: Final = ROOT / ".cache" / "architectures"
PAGE: Final = ROOT / "docs" / "architectures.md"
MODES: Final = ("native", "compiled")
SECONDS: Final = {"checkpoint": 120, "native": 180, "compiled": 300}

_SERVERS: Final = multiprocessing.get_context("forkserver")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="regular expression searched in architecture names")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--again", action="store_true", help="forget earlier results of what is run")
    parser.add_argument("--page", action="store_true", help="only write the page from the results that are there")
    options = parser.parse_args(arguments)
    prepare(CACHE)
    chosen = [recipe for recipe in recipes() if re.search(options.only, recipe.name)]
    if not options.page:
        for mode in options.modes:
            _run_all(chosen, mode, again=options.again)
    page = architecture_page.page([(recipe, results(CACHE, recipe)) for recipe in recipes()])
    PAGE.write_text(page)
    print(f"wrote {PAGE.relative_to(ROOT)}")


def prepare(cache: Path) -> None:
    """Environment of all engines, and what the processes share, imported once."""
    cache.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("VLLM_CACHE_ROOT", str(cache / "vllm"))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    _SERVERS.set_forkserver_preload(["architecture_run", "transformers", "vllm.entrypoints.llm", "grpc"])


def _run_all(chosen: Sequence[Recipe], mode: str, *, again: bool) -> None:
    for number, recipe in enumerate(chosen, 1):
        out = CACHE / recipe.name / f"{mode}.json"
        if again:
            out.unlink(missing_ok=True)
        if out.exists():
            continue
        began = time.monotonic()
        result = run(CACHE, recipe, mode)
        said = result.get("error") or f"{len(result.get('sites', []))} sites"
        seconds = time.monotonic() - began
        print(f"[{number}/{len(chosen)}] {mode} {recipe.name}: {said[:120]} ({seconds:.0f} s)", flush=True)


def run(cache: Path, recipe: Recipe, mode: str) -> dict[str, Any]:
    """One engine's result; the checkpoint is made first where it is missing."""
    folder = cache / recipe.name
    model = folder / "model"
    if not (model / "config.json").exists():
        made = _in_process(_make, (recipe, model), folder / "checkpoint", SECONDS["checkpoint"])
        if "error" in made:
            return made
    return _in_process(_serve, (recipe, model, mode), folder / mode, SECONDS[mode])


def results(cache: Path, recipe: Recipe) -> dict[str, Any]:
    """What there is of one architecture: ``native``, ``compiled``, ``checkpoint`` and ``transformers``."""
    folder = cache / recipe.name
    paths = {name: folder / f"{name}.json" for name in ("checkpoint", *MODES)}
    paths["transformers"] = folder / "model" / "transformers.json"
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def _in_process(target: Any, arguments: tuple[Any, ...], stem: Path, seconds: float) -> dict[str, Any]:
    """Run ``target(*arguments, OUT)`` in a process of its own; its output goes to ``stem.log``, its result to JSON."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    out = stem.with_suffix(".json")
    out.unlink(missing_ok=True)
    process = _SERVERS.Process(target=_logged, args=(target, arguments, out))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        out.write_text(json.dumps({"error": f"nothing after {seconds:.0f} s"}))
    if not out.exists():
        out.write_text(json.dumps({"error": f"the process ended with exit code {process.exitcode}"}))
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def _logged(target: Any, arguments: tuple[Any, ...], out: Path) -> None:
    with _output_to(out.with_suffix(".log")):
        target(*arguments, out)


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    with path.open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        yield


def _make(recipe: Recipe, folder: Path, out: Path) -> None:
    try:
        make_checkpoint(recipe, folder)
        out.write_text("{}")
    except Exception as error:
        (folder / "config.json").unlink(missing_ok=True)
        said = " ".join(str(error).split())
        out.write_text(json.dumps({"error": f"transformers: {type(error).__name__}: {said}"}))


def _serve(recipe: Recipe, folder: Path, mode: str, out: Path) -> None:
    import architecture_run

    out.write_text(json.dumps(architecture_run.serve(recipe, folder, mode)))


if __name__ == "__main__":
    main()
