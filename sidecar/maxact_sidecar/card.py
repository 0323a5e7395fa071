"""Calibration cards: the statistics of everything an engine saw, as a JSON document (schema 1).

A card is made of live state (`build_card`) and judged against (`Card.limits`): its absmax per site is the limit of the
headroom meaning ``range``. It holds scalars only, no token and no text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    StrictBool,
    ValidationError,
    model_validator,
)

from maxact_proto import stats, wire
from maxact_sidecar import merge
from maxact_sidecar.config import CardSource, describe
from maxact_sidecar.snapshot import SiteKey, Snapshot

SCHEMA: Literal[1] = 1


class CardError(ValueError):
    """A card that cannot be read, made or used. The message names the file and the JSON path."""


def _known_site(name: str) -> str:
    if name not in stats.SITES:
        raise ValueError(f"{name!r} is not a site; sites are {', '.join(stats.SITES)}")
    return name


def _no_truth(value: object) -> object:
    if isinstance(value, bool):  # Python counts it among the numbers, JSON does not
        raise ValueError(f"{str(value).lower()} is not a number")
    return value


Count = Annotated[NonNegativeInt, BeforeValidator(_no_truth)]
Number = Annotated[float, BeforeValidator(_no_truth)]


class CardTokens(BaseModel):
    """Tokens behind a card, per phase."""

    first: Count
    prefill: Count
    decode: Count


class CardSite(BaseModel):
    """Statistics of one site in one phase."""

    model_config = ConfigDict(allow_inf_nan=False)

    layer: Count | None
    """None for embedding and final_norm."""
    site: Annotated[str, AfterValidator(_known_site), Field(json_schema_extra={"enum": list(stats.SITES)})]
    phase: Literal["first", "prefill", "decode"]
    width: Count = Field(gt=0)
    """Elements per token, all shards."""
    min: Number
    max: Number
    absmax: Number = Field(ge=0)
    rms: Number = Field(ge=0)
    mean_abs: Number = Field(ge=0)
    elements: Count
    tokens: Count
    nonfinite: Count
    """Token rows holding a NaN or an infinity; in no other number."""


class Card(BaseModel):
    """A calibration card. Unknown keys are ignored: an additive change keeps the schema number."""

    model_config = ConfigDict(allow_inf_nan=False, serialize_by_alias=True, validate_by_name=True)

    schema_version: Literal[1] = Field(default=SCHEMA, alias="schema")
    model: str = Field(min_length=1, max_length=wire.MAX_STRING)
    model_type: str
    engine: str | None
    """None where several engines were merged."""
    dtype: str
    bos: StrictBool | None = None
    created_seconds: Number
    maxact_version: str
    vllm_version: str
    prompts: Count | None = None
    tokens: CardTokens
    # `_refuse_duplicates`, as far as JSON Schema can say it.
    sites: list[CardSite] = Field(min_length=1, json_schema_extra={"uniqueItems": True})

    @model_validator(mode="after")
    def _refuse_duplicates(self) -> Card:
        seen = set()
        for index, site in enumerate(self.sites):
            key = (site.layer, site.site, site.phase)
            if key in seen:
                raise ValueError(f"sites[{index}]: layer {site.layer} {site.site} {site.phase} is listed twice")
            seen.add(key)
        return self

    @property
    def num_tokens(self) -> int:
        """Tokens of all phases."""
        return self.tokens.first + self.tokens.prefill + self.tokens.decode

    def limits(self) -> dict[SiteKey, float]:
        """The calibrated absmax per site, over all phases."""
        limits: dict[SiteKey, float] = defaultdict(float)
        for site in self.sites:
            limits[site.layer, site.site] = max(limits[site.layer, site.site], site.absmax)
        return dict(limits)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedCard:
    """A card in use under a name, for one served model."""

    name: str
    served_model: str
    card: Card
    configured: bool = False
    """True where the configuration names it, False where it was loaded into the running sidecar."""


def read_card(path: Path) -> Card:
    """The card in a file. Raises `CardError` naming the file and the place in it."""
    try:
        return Card.model_validate_json(path.read_bytes())
    except OSError as error:
        raise CardError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        raise CardError("\n".join(f"{path}: {line}" for line in describe(error))) from None


def read_cards(sources: Iterable[CardSource]) -> list[LoadedCard]:
    """The cards of a configuration, named after their files. Raises `CardError`."""
    cards: list[LoadedCard] = []
    for source in sources:
        card = read_card(source.path)
        name, model = source.path.stem, source.model or card.model
        if any((each.name, each.served_model) == (name, model) for each in cards):
            raise CardError(f"{source.path}: another card for model {model} is named {name!r} too; rename the file")
        cards.append(LoadedCard(name=name, served_model=model, card=card))
    return cards


def build_card(snapshots: Sequence[Snapshot], *, now: float, maxact_version: str) -> Card:
    """The card of everything these engines of one model saw since their workers started.

    ``now`` is in seconds since the epoch. Raises `CardError` where no token was seen.
    """
    first = snapshots[0]
    sites = _merge_engines(snapshots)
    if not sites:
        raise CardError(f"{first.model}: no tokens seen yet; send a request first")
    return Card(
        model=first.model,
        model_type=first.model_type,
        engine=first.engine if len(snapshots) == 1 else None,
        dtype=first.dtype,
        created_seconds=now,
        maxact_version=maxact_version,
        vllm_version=first.vllm_version,
        tokens=CardTokens(**dict(zip(stats.PHASES, _add_tokens(snapshots), strict=True))),
        sites=sites,
    )


def _add_tokens(snapshots: Sequence[Snapshot]) -> list[int]:
    return [sum(counts) for counts in zip(*(snapshot.worker_tokens for snapshot in snapshots), strict=True)]


def _merge_engines(snapshots: Sequence[Snapshot]) -> list[CardSite]:
    """Engines serve disjoint tokens: extrema merge, sums and elements add up."""
    keys = sorted({key: None for snapshot in snapshots for key in snapshot.keys}, key=site_order)
    position = {key: index for index, key in enumerate(keys)}
    extrema = merge.empty_extrema(len(keys))
    sums = np.zeros((4, len(stats.PHASES), len(keys)))
    elements = np.zeros(sums.shape[1:])
    widths: dict[SiteKey, int] = {}
    for snapshot in snapshots:
        at = np.array([position[key] for key in snapshot.keys])
        extrema[..., at] = np.maximum(extrema[..., at], snapshot.total.extrema)
        sums[..., at] += snapshot.total.sums
        elements[..., at] += snapshot.total.elements
        widths |= {key: site.width for key, site in zip(snapshot.keys, snapshot.sites, strict=True)}
    merged = merge.Statistics(extrema=extrema, sums=sums, elements=elements, counts=merge.no_counts(len(keys)))
    return _card_sites(keys, widths, merged)


def _card_sites(keys: list[SiteKey], widths: dict[SiteKey, int], merged: merge.Statistics) -> list[CardSite]:
    minimum, maximum, absmax = merged.minimum, merged.maximum, merged.absmax
    rms, mean_abs = merged.rms, merged.mean_abs
    return [
        CardSite(
            layer=layer,
            site=name,
            phase=stats.PHASES[phase],
            width=widths[layer, name],
            min=minimum[phase, index],
            max=maximum[phase, index],
            absmax=absmax[phase, index],
            rms=rms[phase, index],
            mean_abs=mean_abs[phase, index],
            elements=int(merged.elements[phase, index]),
            tokens=int(merged.sums[merge.TOKENS, phase, index]),
            nonfinite=int(merged.sums[merge.NONFINITE, phase, index]),
        )
        for index, (layer, name) in enumerate(keys)
        for phase in range(len(stats.PHASES))
        if merged.elements[phase, index] > 0 and np.isfinite(absmax[phase, index])
    ]


def site_order(key: SiteKey) -> tuple[float, int]:
    """Sort key of sites as a token meets them: embedding, the layers, final_norm."""
    layer, name = key
    rank = list(stats.SITES).index(name)
    if layer is None:
        return (-1 if name == "embedding" else float("inf"), rank)
    return (layer, rank)
