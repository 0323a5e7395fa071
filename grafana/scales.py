"""Colours: what a value means, in one place. A step is (from this value on, colour); the first starts at None.

No threshold is here: what is judged is shown over its threshold, which a rule records, so that the colour turns at 1
(decibels, whose difference is a quotient, at 0).
"""

from __future__ import annotations

from typing import Any, Final

from grafana.panels import Steps, value_mapping

from maxact_sidecar.headroom import MEANINGS

BLUE, TEAL, GREEN, YELLOW, ORANGE, RED = "#2a4f8f", "#2f7f8f", "#4f8f5f", "#b59a2c", "#c9702b", "#b5322f"

DECADES: Final[Steps] = [(None, BLUE), (1, TEAL), (10, GREEN), (100, YELLOW), (1e3, ORANGE), (1e4, RED)]
"""For magnitudes: activations span six orders."""

OCTAVES: Final[Steps] = [(None, BLUE), (0.5, TEAL), (1, GREEN), (2, YELLOW), (4, ORANGE), (8, RED)]
"""For ratios of two magnitudes."""

ABOVE_FLOOR: Final[Steps] = [(None, RED), (0, ORANGE), (10, YELLOW), (20, GREEN)]
"""For decibels above a floor: one colour for a tenth of the noise."""

UNDER_LIMIT: Final[Steps] = [(None, GREEN), (0.25, YELLOW), (0.5, ORANGE), (1, RED)]
"""For shares over their limit: one colour for twice as much."""

NONE_GOOD: Final[Steps] = [(None, "dark-green"), (1, "dark-red")]
"""For counts of what should not be there."""


def margin_steps(meaning: str = "range") -> Steps:
    """For margins: 1 is where the flag is, by definition.

    A raised flag clears at the second step, so between the two a site is close to its flag.
    """
    hysteresis = MEANINGS[meaning].clear_at / MEANINGS[meaning].raise_below
    return [(None, "dark-red"), (1, "dark-orange"), (round(hysteresis, 3), "dark-green")]


NEAR: Final[Steps] = [(None, "dark-green"), (1, "dark-orange")]
"""For what is worth a look from its threshold on."""

FLAG: Final[Any] = value_mapping({"0": ("", "transparent"), "1": ("raised", "dark-red")})
UP: Final[Any] = value_mapping({"0": ("down", "dark-red"), "1": ("up", "dark-green")})
