"""Hop 1/9: what is measured. One row per statistic: name, unit, merge rule, help.

Everything downstream derives from this table: the columns of the plugin's accumulators, the order of floats on the
wire, merging across ranks and windows, the metric catalogue and the panels. A statistic is raw and sufficient: ratios
(rms, crest factor, headroom) are derived where they are read, never shipped or merged.

One value is kept per (phase, site, statistic). The phases are disjoint, so that their sums are the totals:

- ``first``: position 0 of a sequence (where massive activations live; without BOS it is the first prompt token),
- ``prefill``: every other prompt token that was computed (tokens served from the prefix cache are not recomputed),
- ``decode``: tokens behind the prompt, drafts of speculative decoding included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float32]
"""Statistics, float32, shape ``[..., num_phases, num_sites, num_stats]`` in the order of PHASES and STATS."""

Merge = Literal["max", "min", "sum"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stat:
    """One statistic of one site: what it is and how two partial values become one."""

    name: str
    unit: str
    merge: Merge
    """Rule for two windows or two shards. An extreme is never averaged."""
    help: str

    @property
    def identity(self) -> float:
        """The value of a site that saw nothing: merging it changes nothing."""
        return {"max": -np.inf, "min": np.inf, "sum": 0.0}[self.merge]


STATS: Final = (
    Stat(name="max", unit="activation", merge="max", help="Largest signed value"),
    Stat(name="min", unit="activation", merge="min", help="Smallest signed value"),
    Stat(name="sum_squares", unit="activation squared", merge="sum", help="Sum of squares over all elements"),
    Stat(name="sum_abs", unit="activation", merge="sum", help="Sum of magnitudes over all elements"),
    Stat(
        name="nonfinite", unit="tokens", merge="sum", help="Token rows holding a NaN or an infinity; in no other column"
    ),
)
MAX, MIN, SUM_SQUARES, SUM_ABS, NONFINITE = range(len(STATS))
COUNTS: Final = (
    Stat(name="saturated", unit="elements", merge="sum", help="Elements beyond the limit of the served static scale"),
    Stat(name="zeroed", unit="elements", merge="sum", help="Elements that the served static scale rounds to zero"),
)
"""Counted exactly, in int64, where the served checkpoint has a static scale for the site."""
SATURATED, ZEROED = range(len(COUNTS))

NUM_EXTREMA: Final = 2
"""The first columns, MAX and MIN, are also kept over the lifetime of a worker."""

PHASES: Final = ("first", "prefill", "decode")
FIRST, PREFILL, DECODE = range(len(PHASES))

NUM_BINS: Final = 64
"""Of the histogram of ``|x|`` that is kept per site: halves of octaves, each octave halved at 1.5 times its start."""
LOWEST_OCTAVE: Final = -22
"""The first bin begins at 2^-22 and holds everything below as well; the last, from 1.5 x 2^9, everything above."""
BIN_EDGES: Final = np.array(
    [2.0**octave * start for octave in range(LOWEST_OCTAVE, LOWEST_OCTAVE + NUM_BINS // 2) for start in (1.0, 1.5)]
)
"""Where each bin begins, ``[NUM_BINS]``."""
SAMPLE_EVERY: Final = 64
"""Of the token rows one in so many is counted in the histogram, of large steps fewer, each with its weight."""

SITES: Final = {
    "embedding": "token embedding output",
    "hidden": "residual stream after a decoder layer",
    "attn_input": "input of the q/k/v projection",
    "k": "keys, or a latent attention's one vector, as they enter the KV cache",
    "v": "values, as they enter the KV cache",
    "o_proj_input": "input of the attention output projection",
    "attn_output": "attention block output, before any post-norm and the residual add",
    "attn_post_norm": "output of a norm between the attention block and the residual add",
    "mlp_input": "input of the MLP block or its gate/up projection",
    "router_logits": "output of a mixture's router",
    "moe_input": "what a mixture's routed experts are given",
    "expert_act": "product inside routed experts, the input of their down projection",
    "mlp_gate": "gate projection, before the activation",
    "down_proj_input": "input of the down projection",
    "mlp_output": "MLP block output, before any post-norm and the residual add",
    "post_norm": "output of a norm between the MLP block and the residual add",
    "final_norm": "final norm output",
}
"""Site names in the order a token meets them, and their tensors. ``embedding`` and ``final_norm`` have no layer."""

Counts = npt.NDArray[np.int64]
"""int64, shape ``[num_phases, num_sites, num_counts]`` in the order of PHASES and COUNTS."""

_IDENTITIES: Final = np.array([stat.identity for stat in STATS], dtype=np.float32)
_SUM_COLUMNS: Final = [index for index, stat in enumerate(STATS) if stat.merge == "sum"]


def empty(num_sites: int) -> Values:
    """Statistics of ``num_sites`` sites that saw nothing, shape ``[num_phases, num_sites, num_stats]``."""
    return np.tile(_IDENTITIES, (len(PHASES), num_sites, 1))


def merge_into(target: npt.NDArray[np.floating], other: npt.NDArray[np.floating]) -> None:
    """Merge ``other`` into ``target`` in place, by each statistic's rule; both ``[..., num_stats]``."""
    np.maximum(target[..., MAX], other[..., MAX], out=target[..., MAX])
    np.minimum(target[..., MIN], other[..., MIN], out=target[..., MIN])
    target[..., _SUM_COLUMNS] += other[..., _SUM_COLUMNS]


def absmax(values: Values) -> npt.NDArray[np.float32]:
    """``max |x|`` per site, ``[...]`` from ``[..., num_stats]``; ``-inf`` where nothing was seen."""
    return np.maximum(values[..., MAX], -values[..., MIN])
