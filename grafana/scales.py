"""Colours: what a value means, in one place. A step is (from this value on, colour); the first starts at None."""

from __future__ import annotations

from typing import Any, Final

from grafana.panels import Steps, value_mapping

from maxact_sidecar.headroom import MEANINGS

BLUE, TEAL, GREEN, YELLOW, ORANGE, RED = "#2a4f8f", "#2f7f8f", "#4f8f5f", "#b59a2c", "#c9702b", "#b5322f"

DECADES: Final[Steps] = [(None, BLUE), (1, TEAL), (10, GREEN), (100, YELLOW), (1e3, ORANGE), (1e4, RED)]
"""For magnitudes: activations span six orders."""

OCTAVES: Final[Steps] = [(None, BLUE), (0.5, TEAL), (1, GREEN), (2, YELLOW), (4, ORANGE), (8, RED)]
"""For ratios of two magnitudes."""

DECIBELS: Final[Steps] = [(None, RED), (10, ORANGE), (20, YELLOW), (30, GREEN)]
"""For signal over quantization noise: under 10 dB a tenth of the power is noise."""

SHARES: Final[Steps] = [(None, GREEN), (0.1, YELLOW), (0.25, ORANGE), (0.5, RED)]
"""For shares of elements that are lost; half is where a `resolution` flag goes up."""

NONE_GOOD: Final[Steps] = [(None, "dark-green"), (1, "dark-red")]
"""For counts of what should not be there."""


def margin_steps(meaning: str = "range") -> Steps:
    """For margins: the headroom ratio over its threshold, so that 1 is where the flag is, by definition.

    A raised flag clears at the second step, so between the two a site is close to its flag.
    """
    hysteresis = MEANINGS[meaning].clear_at / MEANINGS[meaning].raise_below
    return [(None, "dark-red"), (1, "dark-orange"), (round(hysteresis, 3), "dark-green")]


FLAG: Final[Any] = value_mapping({"0": ("", "transparent"), "1": ("raised", "dark-red")})
UP: Final[Any] = value_mapping({"0": ("down", "dark-red"), "1": ("up", "dark-green")})
