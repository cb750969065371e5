# SPDX-License-Identifier: Apache-2.0
"""keydiff: the tokens whose keys differ most from the others stay.

Park et al. 2025, arXiv:2504.15364, section 3: keys are made unit vectors, their mean is the anchor, and the token whose
key has the largest cosine with the anchor leaves first. No query is looked at, so nothing depends on what is asked.

The paper renews the anchor with every token. Here it is that of the last compression: tokens that come later stand
above all that it ranked, so that no step reads all keys to choose a victim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import normalize

from kvopt.cache.policies.base import WHAT, DecodeRule, Policy, Tokens, built_in
from kvopt.grammar import take_number


@built_in("keydiff")
@dataclass(frozen=True)
class KeyDiff(Policy):
    """Keys unlike the mean.

    Args:
        recent: how many newest tokens stay whatever their key.
    """

    recent: int = 8
    options: ClassVar[tuple[str, ...]] = ("r",)

    @property
    def minimum(self) -> int:
        """The recent part."""
        return max(1, self.recent)

    @property
    def decode(self) -> DecodeRule:
        """The lowest score leaves; new tokens stand above all of the prompt's."""
        return DecodeRule(order=1, new_score=float("inf"))

    def scores_of(self, tokens: Tokens) -> torch.Tensor:
        """(B, H, n) float32: minus the cosine of key and anchor; infinite for the recent part."""
        assert tokens.keys is not None
        there = (tokens.positions >= 0)[..., None]
        units = normalize(tokens.keys.float(), dim=-1)
        anchor = normalize(units.masked_fill(~there, 0.0).sum(dim=2, keepdim=True), dim=-1)
        cosine = (units * anchor).sum(dim=-1)
        return (-cosine).masked_fill(tokens.among_newest(self.recent), float("inf"))

    def priority(self, tokens: Tokens) -> torch.Tensor:
        """The score."""
        assert tokens.scores is not None
        return tokens.scores

    @classmethod
    def from_settings(cls, settings: dict[str, int | bool], text: str) -> KeyDiff:
        """``_r8``."""
        recent = take_number(settings, "r", cls.recent, 0, 2**20, what=WHAT, text=text)
        assert recent is not None
        return cls(recent)

    def settings(self) -> str:
        """``""`` or ``_r32``."""
        return "" if self.recent == type(self).recent else f"_r{self.recent}"
