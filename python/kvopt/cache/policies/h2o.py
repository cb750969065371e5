# SPDX-License-Identifier: Apache-2.0
"""h2o: the tokens that have collected the most attention stay, and the newest.

Zhang et al. 2023, arXiv:2306.14048, section 4: s_j = Σ_i softmax(q_i·K/√d)_j over all queries i ≥ j so far, per KV
head summed over its query heads; the weights of one query add up to 1, so the scores of a head add up to queries ×
heads of its group. One half of the budget is for the newest tokens, the other for those with the largest scores.

An old token was seen by more queries than a young one; ``age`` divides by their number (not in the paper).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvopt.cache.policies.base import HALF, WHAT, DecodeRule, Observation, Policy, Tokens, built_in
from kvopt.grammar import take_number, take_word


@built_in("h2o")
@dataclass(frozen=True)
class H2O(Policy):
    """Heavy hitters and the newest.

    Args:
        recent: how many newest tokens stay whatever their score; None for the larger half of what a head may keep.
        age: compare scores per query that could see the token.
    """

    recent: int | None = None
    age: bool = False
    options: ClassVar[tuple[str, ...]] = ("r", "age")

    @property
    def minimum(self) -> int:
        """The recent part and one heavy hitter."""
        return 2 if self.recent is None else self.recent + 1

    @property
    def observation(self) -> Observation:
        """Column sums over all queries."""
        return Observation()

    @property
    def decode(self) -> DecodeRule:
        """The lowest sum leaves; every step adds to the sums."""
        recent = HALF if self.recent is None else self.recent
        return DecodeRule(order=1, recent=recent, age=self.age, update=1)

    def priority(self, tokens: Tokens) -> torch.Tensor:
        """The recent part, then by score."""
        assert tokens.scores is not None and tokens.newest is not None
        scores = tokens.scores
        if self.age:
            scores = scores / (tokens.newest[:, None, None] + 1 - tokens.positions)
        recent = HALF if self.recent is None else self.recent
        return scores.masked_fill(tokens.among_newest(recent), float("inf"))

    @classmethod
    def from_settings(cls, settings: dict[str, int | bool], text: str) -> H2O:
        """``_r64`` and ``_age``."""
        recent = take_number(settings, "r", None, 1, 2**20, what=WHAT, text=text)
        return cls(recent, take_word(settings, "age", what=WHAT, text=text))

    def settings(self) -> str:
        """``""``, ``_r64``, ``_age`` or ``_r64_age``."""
        return ("" if self.recent is None else f"_r{self.recent}") + ("_age" if self.age else "")
