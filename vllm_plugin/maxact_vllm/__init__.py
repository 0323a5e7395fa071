"""maxact inside vLLM: compiles range statistics into the served model and streams them to a sidecar.

vLLM imports this package and calls `register` in every process it starts (API server, engine core, workers), perhaps
twice. So importing it pulls in neither torch nor grpc, and installed-but-not-asked-for is inert: `register` teaches
vLLM's parser its flags and looks at each worker once, nothing more. `MAXACT_DISABLE=1` removes even that.
"""

from __future__ import annotations

import logging
import os

from maxact_proto import __version__

__all__ = ["__version__", "register"]

logger = logging.getLogger("vllm.maxact")


def register() -> None:
    """Entry point of the group ``vllm.general_plugins``. Idempotent; never raises into vLLM."""
    if os.environ.get("MAXACT_DISABLE", "") not in ("", "0"):
        return
    try:
        from maxact_vllm import plugin

        plugin.install()
    except Exception as error:
        logger.warning("maxact stays out of the way: registration failed: %s: %s", type(error).__name__, error)
