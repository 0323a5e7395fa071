"""Addresses of the dashboards, and links from a row or a cell to the site it is about."""

from __future__ import annotations

from typing import Any, Final

UIDS: Final = {
    "overview": "maxact-overview",
    "model": "maxact-model",
    "site": "maxact-site",
    "self": "maxact-self",
}
"""File name -> uid; links and bookmarks rely on them."""

ALL: Final = "$__all"

_CARRIED: Final = ("job", "instance", "model_name", "engine", "layer", "site")


def to_site(**fields: str) -> list[dict[str, Any]]:
    """A data link to maxact / Site that carries time range and variables, but for the ``fields``: variable -> value."""
    carried = [
        f"var-{name}={fields[name]}" if name in fields else f"${{{name}:queryparam}}"
        for name in ("datasource", *_CARRIED)
    ]
    url = f"/d/{UIDS['site']}?{'&'.join([*carried, '${__url_time_range}'])}"
    return [{"title": "Open the site", "url": url, "targetBlank": False}]
