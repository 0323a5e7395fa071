"""``make demo``: serve a model observed, calibrate on calm prompts, watch other traffic leave the calibrated range.

    python scripts/demo.py [--once] [--model DIR_OR_HUB_ID] [--port 8000] [--http ADDR] [--grpc ADDR]

With ``--once`` it checks itself and ends with a last line ``RESULT {"demo": "ok", ...}``: ``jump_layer`` and
``jump_absmax`` (where calm prompts show the residual stream's massive activation, and how large), ``over_published``
(that over its published size; 0.8 to 1.25 pass), ``largest`` (layer, site, absmax, phase over all prompts), ``flags``
(``range`` flags raised), ``resolution_flags``, ``series`` (scraped), ``start_seconds`` (to a served, compiled model),
``cold_seconds`` (the whole demo).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from maxact_calibration import model as smol

START_SECONDS = 900.0
"""The first start compiles the model; on two busy cores that was seen to take five minutes."""
HEARTBEAT_SECONDS = 15.0
"""Where no terminal shows a moving line, a new one comes this often."""
SHOWN_PER_SITE = 3
"""A residual stream keeps its massive activation for many layers; they would fill the table."""
SETTLE_SECONDS = 2.5
"""Longer than one window and its way to the sidecar."""

CALM = (
    "The weather in the small town was mild and the children played in the garden until the evening.",
    "She opened the letter, read it slowly, and put it back on the kitchen table.",
    "Bread is made from flour, water, salt and yeast, and it is baked in a hot oven.",
    "The train left the station on time and arrived in the city a little before noon.",
    "My grandfather used to tell us stories about the years he spent at sea.",
    "A good night's sleep helps the body to recover from the work of the day.",
)
DIVERSE = {
    "code": '#include <stdio.h>\nint main(void) {\n  for (int i = 0; i < 9; ++i) printf("%d", i);\n  return 0;\n}\n',
    "json": '{"id": 17, "items": [{"sku": "A-1", "qty": 2}, {"sku": "B-9", "qty": 11}], "total": 103.75}',
    "mathematics": "Let f(x) = x^3 - 6x^2 + 11x - 6. Then f'(x) = 3x^2 - 12x + 11, x = (12 +/- sqrt(12)) / 6",
    "German": "Die Würde des Menschen ist unantastbar. Sie zu achten und zu schützen ist Verpflichtung aller Gewalt.",
    "Russian": "В начале было слово, и слово было у Бога, и слово было Бог. Все счастливые семьи похожи друг на друга.",
    "Chinese": "人工智能正在改变世界各地的工业、教育和医疗。学而时习之,不亦说乎?有朋自远方来,不亦乐乎?",
    "Arabic": "في البدء كان الكلمة، والكلمة كان عند الله. أهلا وسهلا بكم في مدينتنا الجميلة.",
    "digits": "3.14159265358979323846264338327950288419716939937510582097494459230781640628620899",
    "repetition": "the " * 300,
    "rare symbols": "☃ ⌘ ∰ ꙮ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ﷽ \x0b\x1c�� ¬¬¬ §§§ ¶¶ ÿþ",
    "control tokens": "<|im_start|>system\n<|im_end|><|im_start|><|im_start|><|endoftext|><|im_end|>\n",
}

console = Console(stderr=True)


class DemoError(RuntimeError):
    """What stopped the demo, in a line or two for the user."""


def main() -> None:
    """Run the demo; status 2 with a clear line where it cannot go on."""
    args = _parse()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        run(args)
    except (DemoError, smol.ModelError) as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename or 'system'}: {error.strerror}")
    except KeyboardInterrupt:
        console.print("\nstopped, nothing is left running")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--once", action="store_true", help="check what was found, then stop")
    parser.add_argument("--model", default="", help="serve this instead of SmolLM2-135M-Instruct")
    parser.add_argument("--port", type=int, default=8000, help="port of vLLM's API")
    parser.add_argument("--http", default="127.0.0.1:9471", help="address of the sidecar's page and metrics")
    parser.add_argument("--grpc", default="127.0.0.1:4471", help="address between vLLM and the sidecar")
    return parser.parse_args()


def _fail(message: str) -> NoReturn:
    console.print(f"demo: {message}", style="red", markup=False, highlight=False)
    sys.exit(2)


def run(args: argparse.Namespace) -> None:
    """The story: serve, calibrate, provoke, look."""
    began = time.monotonic()
    for address in (f"127.0.0.1:{args.port}", args.http, args.grpc):
        _require_free(address)
    folder = Path(".cache/demo").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    model = args.model or _smollm2()
    api, sidecar = f"http://127.0.0.1:{args.port}", f"http://{args.http}"
    name = args.model or smol.NAME
    with _served(model, name, args, folder) as started:
        console.print(f"[bold]1[/] vLLM serves {name}, compiled, observed ({started:.0f} s)")
        for prompt in CALM:
            _complete(api, name, prompt)
        time.sleep(SETTLE_SECONDS)
        card = folder / "card.json"
        _maxact("card", sidecar, "--output", str(card))
        _maxact("card", sidecar, "--load", str(card))
        console.print(f"[bold]2[/] {len(CALM)} calm English prompts made a calibration card: {os.path.relpath(card)}")
        for prompt in DIVERSE.values():
            _complete(api, name, prompt)
        time.sleep(SETTLE_SECONDS)
        console.print(f"[bold]3[/] then came {', '.join(DIVERSE)}", soft_wrap=True)
        found = _look(sidecar)
        _show(found)
        console.print(f"vLLM {api}/v1   metrics {sidecar}/metrics   page {sidecar}/", highlight=False, soft_wrap=True)
        if args.once:
            found |= {"card": json.loads(card.read_text())["sites"], "log": (folder / "serve.log").read_text()}
            result = _check(found, is_smollm2=not args.model)
            result |= {"start_seconds": round(started, 1), "cold_seconds": round(time.monotonic() - began, 1)}
            print("RESULT " + json.dumps(result), flush=True)
            return
        console.print("Serving until Ctrl-C.")
        signal.pause()


def _smollm2() -> str:
    if (smol.cached_directory() / "config.json").exists():
        return str(smol.cached_directory())
    console.print("Converting SmolLM2-135M-Instruct, once (half a minute)")
    return str(smol.smollm2())


def _require_free(address: str) -> None:
    if address.startswith("unix:"):
        return
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit() and int(port) < 65536):
        raise DemoError(f"{address!r} is not an address; write host:port, for example 127.0.0.1:9471")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except OSError as error:
            raise DemoError(
                f"{address}: {error.strerror}; stop what runs there or choose others: "
                "make demo PORT=8001 HTTP=127.0.0.1:9571 GRPC=127.0.0.1:4571"
            ) from None


@contextlib.contextmanager
def _served(model: str, name: str, args: argparse.Namespace, folder: Path) -> Iterator[float]:
    """`maxact serve` until the context ends; yields the seconds it took to come up."""
    command = [Path(sys.executable).with_name("maxact"), "serve", model, "--http", args.http, "--grpc", args.grpc]
    # One prompt at a time and short ones: a small cache and context leave the memory to others.
    command += ["--served-model-name", name, "--port", str(args.port), "--host", "127.0.0.1"]
    command += ["--max-model-len", "1024", "--max-num-seqs", "16", "--max-num-batched-tokens", "2048"]
    command += ["--maxact-interval", "0.5"]
    environ = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **os.environ}
    log = folder / "serve.log"
    started = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env=environ, start_new_session=True, preexec_fn=_end_with_parent
        )
    try:
        with _Progress(f"vLLM starts and compiles {name} (log: {os.path.relpath(log)})") as progress:
            while not _answers(f"http://127.0.0.1:{args.port}/health"):
                _require_alive(process, log, time.monotonic() - started)
                progress.show(_last_words(log))
                time.sleep(0.5)
        yield time.monotonic() - started
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # nothing interrupts stopping
        process.terminate()
        process.wait()


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class _Progress:
    """Seconds and the last words of a long step: one moving line on a terminal, now and then a line elsewhere."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._began = self._shown = time.monotonic()
        self._status = console.status(title)

    def __enter__(self) -> _Progress:
        self._status.__enter__()
        if not console.is_terminal:
            console.print(self._title, highlight=False)
        return self

    def __exit__(self, *error: Any) -> None:
        self._status.__exit__(*error)

    def show(self, words: str) -> None:
        """Say that it goes on."""
        now = time.monotonic()
        line = f"{now - self._began:.0f} s  {words[:90]}"
        self._status.update(f"{self._title}\n  {escape(line)}")
        if not console.is_terminal and now - self._shown >= HEARTBEAT_SECONDS:
            self._shown = now
            console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)


def _last_words(log: Path) -> str:
    """The message of the last line vLLM logged."""
    # Left out: vLLM's wondering that a compilation takes long.
    lines = [line for line in log.read_text(errors="replace").splitlines() if "] " in line and "shm_broad" not in line]
    return lines[-1].rpartition("] ")[2] if lines else "loading programs"


def _require_alive(process: subprocess.Popen[bytes], log: Path, seconds: float) -> None:
    if process.poll() is None and seconds < START_SECONDS:
        return
    lines = log.read_text(errors="replace").splitlines()
    errors = [line for line in lines if "rror" in line]
    tail = "\n".join((errors or lines)[-3:])
    raise DemoError(f"the server {'ended' if process.poll() is not None else 'is not up'}; {log} says:\n{tail}")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False


def _complete(api: str, model: str, prompt: str) -> None:
    body = {"model": model, "prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{api}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        urllib.request.urlopen(request, timeout=120).close()
    except urllib.error.HTTPError as error:
        raise DemoError(f"vLLM refused a prompt: {error.read().decode(errors='replace')[:300]}") from None


def _maxact(*arguments: str) -> None:
    done = subprocess.run([Path(sys.executable).with_name("maxact"), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise DemoError(f"maxact {' '.join(arguments)}: {done.stderr.strip()}")


def _get(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            text: str = response.read().decode()
            return text
    except OSError as error:
        raise DemoError(f"{url}: {error}") from None


def _look(sidecar: str) -> dict[str, Any]:
    return {
        "sites": json.loads(_get(f"{sidecar}/api/v1/sites")),
        "flags": [flag for flag in json.loads(_get(f"{sidecar}/api/v1/flags")) if flag["active"]],
        "series": sum(line.startswith("maxact_") for line in _get(f"{sidecar}/metrics").splitlines()),
    }


def _peaks(sites: Sequence[dict[str, Any]]) -> list[tuple[float, str, str, str]]:
    """(absmax ever, layer, site, phase) of each site, largest first and, of equals, the one a token meets first."""
    peaks = []
    for site in sites:
        phases = {phase: view["absmax_high_water"] or 0.0 for phase, view in site["phases"].items()}
        phase = max(phases, key=lambda name: phases[name])
        peaks.append((phases[phase], "-" if site["layer"] is None else str(site["layer"]), site["site"], phase))
    return sorted(peaks, key=lambda peak: -peak[0])


def _show(found: dict[str, Any]) -> None:
    table = Table(title=f"Largest activations, up to {SHOWN_PER_SITE} layers of a site", title_justify="left")
    for column in ("layer", "site", "absmax", "phase"):
        table.add_column(column, justify="right" if column in ("layer", "absmax") else "left")
    shown: Counter[str] = Counter()
    for absmax, layer, site, phase in _peaks(found["sites"]):
        shown[site] += 1
        if shown[site] <= SHOWN_PER_SITE and len(table.rows) < 12:
            table.add_row(layer, site, f"{absmax:,.1f}", phase)
    console.print(table)
    flags = _of("range", found)
    _show_flags(f"{len(flags)} range flags: traffic left the calibrated range", flags, shown=10)
    flags = _of("resolution", found)
    if flags:
        title = f"{len(flags)} resolution flags: one INT-8 scale rounds more than half of the tensor to zero"
        _show_flags(title, flags, shown=5)


def _of(meaning: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    return sorted(
        (flag for flag in found["flags"] if flag["meaning"] == meaning), key=lambda flag: flag["headroom_ratio"]
    )


def _show_flags(title: str, flags: Sequence[dict[str, Any]], *, shown: int) -> None:
    table = Table(title=title, title_justify="left")
    for column in ("layer", "site", "phase", "absmax", "limit", "beyond"):
        table.add_column(column, justify="left" if column in ("site", "phase") else "right")
    for flag in flags[:shown]:
        layer = "-" if flag["layer"] is None else str(flag["layer"])
        beyond = f"{100 / flag['headroom_ratio'] - 100:+.0f} %"
        values = (f"{flag['absmax']:,.1f}", f"{flag['limit']:,.1f}")
        table.add_row(layer, flag["site"], flag["phase"], *values, beyond)
    console.print(table)


def _check(found: dict[str, Any], *, is_smollm2: bool) -> dict[str, Any]:
    """What the demo showed, as RESULT has it. Raises `DemoError` where it is not what it is there to show."""
    if "enforce_eager=False" not in found["log"]:
        raise DemoError("vLLM did not say that it runs compiled (enforce_eager=False)")
    absmax, layer, site, phase = _peaks(found["sites"])[0]
    result: dict[str, Any] = {"demo": "ok", "largest": [layer, site, round(absmax, 1), phase]}
    if is_smollm2:
        result |= _jump(found["card"])
    if not _of("range", found):
        raise DemoError("no range flag fired: the diverse prompts stayed in the calibrated range")
    if found["series"] < len(found["sites"]):
        raise DemoError(f"only {found['series']} series were scraped for {len(found['sites'])} sites")
    flags = {"flags": len(_of("range", found)), "resolution_flags": len(_of("resolution", found))}
    return result | flags | {"series": found["series"]}


def _jump(card: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Where the residual stream's absmax grows most from one layer to the next, against what is known of SmolLM2."""
    hidden: dict[int, float] = {}
    for entry in card:
        if entry["site"] == "hidden":
            hidden[entry["layer"]] = max(hidden.get(entry["layer"], 0.0), entry["absmax"])
    jump = max((layer for layer in hidden if layer), key=lambda layer: hidden[layer] / hidden[layer - 1])
    ratio = hidden[jump] / smol.JUMP_ABSMAX
    seen = {"jump_layer": jump, "jump_absmax": round(hidden[jump], 1), "over_published": round(ratio, 3)}
    if jump != smol.JUMP_LAYER or not 0.8 < ratio < 1.25:
        raise DemoError(f"expected the jump to {smol.JUMP_ABSMAX:g} behind layer {smol.JUMP_LAYER}, saw {seen}")
    return seen


if __name__ == "__main__":
    main()
