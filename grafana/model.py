"""Dashboard ``maxact-model``: layer x site heat maps of one or more models, and how they move."""

from __future__ import annotations

from typing import Any, Final

from grafana.board import board, place
from grafana.links import ALL, to_site
from grafana.panels import Column, Query, Text, lines, matrix, rows, verdict
from grafana.query import LAYERED, SHOWN_FORMAT, select, worst_margin
from grafana.scales import ABOVE_FLOOR, DECADES, NONE_GOOD, OCTAVES, UNDER_LIMIT, margin_steps

from maxact_sidecar.headroom import MEANINGS

_LIMITS: Final = {
    "saturation": "the largest magnitude that the deployed scale represents",
    "range": "the absmax of the calibration card",
    "resolution": "the absmax at whose scale in the chosen format half of the elements round to zero (of a block "
    "format: the largest of a block)",
    "fp16": "the largest finite fp16, 65504",
}
"""What each meaning of headroom judges against."""

_OUTSIDE_LINKS: Final = to_site(
    model_name="${__data.fields.Model}", engine="${__data.fields.Engine}", layer=ALL, site="${__data.fields.Site}"
)

_FAR: Final = 99
"""Largest margin shown: fp16 is often a factor of ten thousand away, and a cell has room for five characters."""


def _stats() -> list[tuple[Any, int]]:
    margins = Text(
        id=1,
        title="Smallest margin",
        description="Smallest headroom ratio over its threshold, per meaning and format. Below 1 a flag is raised.",
        unit="none",
    )
    flags = Text(
        id=2,
        title="Raised flags",
        description="Selected sites with a raised flag, per meaning and format.",
        unit="short",
    )
    largest = Text(
        id=3,
        title="Largest absmax now",
        description="Largest magnitude over the hold horizon, all selected sites.",
        unit="short",
    )
    tokens = Text(
        id=4,
        title="Token rows per second",
        description="Token rows that went through the model, per phase. first: position 0 of a sequence; prefill: "
        "the rest of the prompt; decode: behind the prompt. cached: tokens that the prefix cache saved from being "
        "computed, so that nothing is known of them.",
        unit="cps",
    )
    rate = f"sum by (phase) (rate({select('maxact_tokens_total', 'engine')}[$__rate_interval]))"
    cached = f"sum(rate({select('maxact_cached_tokens_total', 'engine')}[$__rate_interval]))"
    flag = f"sum by (meaning, format) ({select('maxact_headroom_flag', 'site')})"
    smallest = Query(expr=f"min by (meaning, format) ({worst_margin()})", legend="{{meaning}} {{format}}")
    peak = Query(expr=f"max({select('maxact_absmax', 'site')})")
    return [
        (verdict(margins, [smallest], steps=margin_steps(), empty="no traffic"), 7),
        (verdict(flags, [Query(expr=flag, legend="{{meaning}} {{format}}")], steps=NONE_GOOD, empty="not judged"), 5),
        (verdict(largest, [peak], empty="no traffic"), 4),
        (verdict(tokens, [Query(expr=rate, legend="{{phase}}"), Query(expr=cached, legend="cached")], empty="idle"), 8),
    ]


def _headroom(index: int, meaning: str) -> Any:
    text = Text(
        id=10 + index,
        title=f"Margin to the {meaning} flag: site by layer",
        description=f"Headroom ratio against {_LIMITS[meaning]}, over the flag's threshold; while a flag is "
        "raised, the worst of the last ten minutes. Red: below 1, the flag is raised. Orange: inside the hysteresis. "
        f"Green: safe; {_FAR} stands for all that is farther away. Click a cell for its history.",
        unit="none",
    )
    of = [SHOWN_FORMAT] if meaning == "resolution" else []
    margins = worst_margin(LAYERED, *of, meaning=meaning)
    expr = f"clamp_max(min by (layer, site) ({margins}), {_FAR})"
    return matrix(text, expr, steps=margin_steps(meaning), decimals=2)


def _magnitude(id: int, metric: str, title: str, description: str) -> Any:
    text = Text(id=id, title=f"{title}: site by layer", description=f"{description} Coloured by decade.", unit="short")
    return matrix(text, f"max by (layer, site) ({select(metric, 'site', LAYERED)})", steps=DECADES, decimals=1)


def _against(id: int, title: str, description: str, upper: str, lower: str) -> Any:
    text = Text(id=id, title=f"{title}: site by layer", description=f"{description} Coloured by octave.", unit="none")
    expr = f"max by (layer, site) ({upper}) / max by (layer, site) ({lower})"
    return matrix(text, expr, steps=OCTAVES, decimals=2)


def _noise() -> Any:
    text = Text(
        id=35,
        title="Signal to quantization noise in $format, above its floor: site by layer",
        description="With one scale of absmax / qmax for the whole tensor (NVFP4: a scale per 16 elements), estimated "
        "from a sample of the last minutes; over the floor, the recorded maxact:sqnr_decibels:floor. Red: below.",
        unit="dB",
    )
    noise = f"min by (layer, site) ({select('maxact_sqnr_decibels', 'site', LAYERED, SHOWN_FORMAT)})"
    expr = f"{noise} - on () group_left () maxact:sqnr_decibels:floor"
    return matrix(text, expr, steps=ABOVE_FLOOR, decimals=0)


def _zeroed() -> Any:
    text = Text(
        id=36,
        title="Rounded to zero in $format, over its limit: site by layer",
        description="Share of elements that become zero with one scale of absmax / qmax for the whole tensor (NVFP4: a "
        "scale per 16 elements), estimated from a sample of the last minutes; over the limit, the recorded "
        "maxact:zeroed_ratio:limit. Red: above.",
        unit="none",
    )
    share = f"max by (layer, site) ({select('maxact_zeroed_ratio', 'site', LAYERED, SHOWN_FORMAT)})"
    expr = f"{share} / on () group_left () maxact:zeroed_ratio:limit"
    return matrix(text, expr, steps=UNDER_LIMIT, decimals=2)


def _outside_margins() -> Any:
    text = Text(
        id=14,
        title="Margins outside the layers",
        description="Embedding and final_norm, which have no layer: headroom ratio over the threshold of its flag, per "
        "meaning and format; while a flag is raised, the worst of the last ten minutes. Below 1 the flag is raised.",
        unit="none",
    )
    columns = [
        Column(field="model_name", title="Model"),
        Column(field="engine", title="Engine", width=100),
        Column(field="site", title="Site", width=200, links=_OUTSIDE_LINKS),
        Column(field="meaning", title="Against", width=150),
        Column(field="format", title="Format", width=150),
        Column(field="A", title="Margin", unit="none", width=150, steps=margin_steps()),
    ]
    margins = f"min by (model_name, engine, site, meaning, format) ({worst_margin(layer='')})"
    return rows(text, [Query(expr=margins)], columns, sort="Margin")


def _heat_maps() -> list[Any]:
    prefill, decode = (select("maxact_absmax", "site", LAYERED, phase=phase) for phase in ("prefill", "decode"))
    lifetime, window = (select(name, "site", LAYERED) for name in ("maxact_absmax_high_water", "maxact_absmax"))
    return [
        _magnitude(30, "maxact_absmax", "Absmax now", "Largest magnitude over the hold horizon, all phases."),
        _magnitude(31, "maxact_absmax_high_water", "Absmax ever", "Largest magnitude since the sidecar's state began."),
        _against(32, "Absmax ever over now", "1: the traffic of now is as extreme as any before.", lifetime, window),
        _against(33, "Prefill over decode", "Absmax of prefill over that of decode, hold horizon.", prefill, decode),
        _magnitude(
            34,
            "maxact_crest_ratio",
            "Crest factor",
            "Absmax over rms. Large: few outliers far above the bulk, which a per-tensor INT-8 scale rounds to zero.",
        ),
        _noise(),
        _zeroed(),
    ]


def _headroom_lines() -> Any:
    text = Text(
        id=50,
        title="Smallest headroom ratio over time",
        description="Limit over absmax, the smallest site per model, meaning and format. Dashed: the threshold that "
        "raises a flag.",
        unit="none",
    )
    ratio = f"min by (model_name, meaning, format) ({select('maxact_headroom_ratio', 'site')})"
    threshold = 'max by (meaning, format) (meaning:maxact_headroom_threshold_ratio:max{job=~"$job"})'
    queries = [
        Query(expr=ratio, legend="{{model_name}} {{meaning}} {{format}}"),
        Query(expr=threshold, legend="threshold {{meaning}} {{format}}"),
    ]
    return lines(text, queries, log=True, dashed="/^threshold/")


def _site_lines() -> Any:
    text = Text(
        id=51,
        title="Absmax by site over time",
        description="Largest magnitude over the hold horizon, per site over its selected layers.",
        unit="short",
    )
    return lines(text, [Query(expr=f"max by (site) ({select('maxact_absmax', 'site')})", legend="{{site}}")], log=True)


def _layer_lines() -> Any:
    text = Text(
        id=52,
        title="Absmax of the eight largest layers",
        description="Largest magnitude over the hold horizon, per layer over its selected sites.",
        unit="short",
    )
    largest = f"topk(8, max by (layer) ({select('maxact_absmax', 'site', LAYERED)}))"
    return lines(text, [Query(expr=largest, legend="layer {{layer}}")], log=True)


def _outside_lines() -> Any:
    text = Text(
        id=53,
        title="Absmax outside the layers",
        description="Embedding and final_norm, per phase, over the hold horizon.",
        unit="short",
    )
    expr = f"max by (site, phase) ({select('maxact_absmax', 'site', layer='')})"
    return lines(text, [Query(expr=expr, legend="{{site}} {{phase}}")], log=True)


def model() -> Any:
    """The dashboard."""
    panels = place(
        [
            (3, _stats()),
            *((9, [(_headroom(index, meaning), 24)]) for index, meaning in enumerate(MEANINGS)),
            (6, [(_outside_margins(), 24)]),
            *((9, [(heat_map, 24)]) for heat_map in _heat_maps()),
            (9, [(_headroom_lines(), 12), (_site_lines(), 12)]),
            (9, [(_layer_lines(), 12), (_outside_lines(), 12)]),
        ]
    )
    description = (
        "Layer by site: margin to each flag, absmax now and ever, prefill against decode, crest factor, what a format "
        "costs."
    )
    return board("model", "maxact / Model", description, depth=6, panels=panels, one_format=True)
