# SPDX-License-Identifier: Apache-2.0
"""kvzip: what is needed to say the context again stays.

Kim et al. 2025, arXiv:2505.23416, section 3: once the prompt has been read, it is read a second time against all of its
own keys. The score of a token is the largest attention weight that any query of the second reading, of any head of
the group, pays to it. It asks what the context itself needs, so it need not know the question.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvopt.cache.policies.base import DecodeRule, Observation, Policy, Tokens, built_in


@built_in("kvzip")
@dataclass(frozen=True)
class KVzip(Policy):
    """What a second reading looks at."""

    second_reading: ClassVar[bool] = True

    @property
    def observation(self) -> Observation:
        """The largest weight over the second reading."""
        return Observation(maximum=True)

    @property
    def decode(self) -> DecodeRule:
        """The lowest score leaves; tokens after the prompt stand above it, of them the oldest leaves."""
        return DecodeRule(order=1, new_score=float("inf"))

    def priority(self, tokens: Tokens) -> torch.Tensor:
        """The score."""
        assert tokens.scores is not None
        return tokens.scores
