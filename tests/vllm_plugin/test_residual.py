"""Which tensor is the residual stream: asked of norms as they come."""

from __future__ import annotations

import pytest
import torch
from torch import nn


class Norm(nn.Module):
    """Has a weight, so it is asked where that lies."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((8,), 0.5))


class Adds(Norm):
    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.weight * (x + residual), x + residual


class AddsInPlace(Norm):
    """As fused kernels do: what was given holds the result."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        residual.add_(x)
        return x.copy_(self.weight * residual), residual


class HandsThrough(Norm):
    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.weight * x, residual


class TakesNone(Norm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what vLLM imports
@pytest.mark.parametrize(
    ("norm", "adds"), [(Adds(), True), (AddsInPlace(), True), (HandsThrough(), False), (TakesNone(), True)]
)
def test_a_norm_adds_the_residual_whether_or_not_it_writes_over_its_input(norm: nn.Module, adds: bool) -> None:
    from maxact_vllm.sites import _adds_residual

    assert _adds_residual(norm, 8) == adds
