# SPDX-License-Identifier: Apache-2.0
"""window: the newest tokens stay.

The sliding window of Beltagy et al. 2020, arXiv:2004.05150, section 3.1, applied at inference to a model that was
trained without one. Keys stay at their original positions: with RoPE only distances count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvopt.cache.policies.base import DecodeRule, Policy, Tokens, built_in


@built_in("window")
@dataclass(frozen=True)
class Window(Policy):
    """The newest tokens stay."""

    positions_only: ClassVar[bool] = True

    @property
    def decode(self) -> DecodeRule:
        """The oldest leaves."""
        return DecodeRule(order=0)

    def priority(self, tokens: Tokens) -> torch.Tensor:
        """The newest first."""
        return tokens.positions
