"""What a skipped sublayer contributes to the residual stream instead of its own output."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class AbstractSkipPath(nn.Module, ABC):
    """Cheap stand-in of one sublayer."""

    @abstractmethod
    def forward(self, hidden: Tensor) -> Tensor | None:
        """Contribution `[B, T, D]` for the sublayer's input `[B, T, D]`; None means zero, without computing it."""


class IdentityPath(AbstractSkipPath):
    """The residual stream passes untouched, as in MindSkip (arXiv 2410.13184, Eq. 3 with M = 0)."""

    def forward(self, hidden: Tensor) -> None:
        return None
