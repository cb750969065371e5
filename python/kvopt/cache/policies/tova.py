# SPDX-License-Identifier: Apache-2.0
"""tova: the token to which the newest query pays the least attention leaves.

Oren et al. 2024, arXiv:2401.06104, section 3.2 (Token Omission Via Attention): weights are averaged over all heads of
a layer, so that its heads keep the same tokens. The newest token takes part like any other once it has been read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvopt.cache.policies.base import DecodeRule, Observation, Policy, Tokens, built_in


@built_in("tova")
@dataclass(frozen=True)
class TOVA(Policy):
    """What the newest query looks at."""

    shared_heads: ClassVar[bool] = True

    @property
    def observation(self) -> Observation:
        """The last query."""
        return Observation(queries=1)

    @property
    def decode(self) -> DecodeRule:
        """The lowest sum over heads leaves; each step's weights replace the scores."""
        return DecodeRule(order=1, shared=True, update=2)

    def priority(self, tokens: Tokens) -> torch.Tensor:
        """The attention of the newest query."""
        assert tokens.scores is not None
        return tokens.scores
