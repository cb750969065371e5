# SPDX-License-Identifier: Apache-2.0
"""full: everything stays. The baseline, without a budget; its memory grows in blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvopt.cache.policies.base import DecodeRule, Policy, Tokens, built_in


@built_in("full")
@dataclass(frozen=True)
class Full(Policy):
    """Everything stays."""

    positions_only: ClassVar[bool] = True

    @property
    def grows(self) -> bool:
        """Always."""
        return True

    @property
    def decode(self) -> DecodeRule:
        """Never needed: there is always room."""
        return DecodeRule()

    def priority(self, tokens: Tokens) -> torch.Tensor:
        """The newest first."""
        return tokens.positions
