"""The command line ``maxact``. Heavy parts are imported by the command that needs them."""

from __future__ import annotations

from typing import Annotated

import typer

from maxact_calibration import doctor, sites
from maxact_calibration import serve as serving
from maxact_proto import __version__
from maxact_sidecar import cli as sidecar_cli

app = typer.Typer(
    name="maxact",
    help="Live activation ranges and quantization headroom from inside vLLM.\n\n"
    "To start: maxact serve MODEL (a sidecar and vllm serve MODEL --plugin maxact, one process to stop).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serving.serve)
app.command()(sidecar_cli.sidecar)
app.command()(sidecar_cli.card)
app.command()(sites.sites)
app.command()(doctor.doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """The help stands at `app`."""


def main() -> None:
    """Entry point."""
    app()
