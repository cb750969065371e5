# SPDX-License-Identifier: Apache-2.0
"""sink: the first tokens and the newest stay.

StreamingLLM, Xiao et al. 2023, arXiv:2309.17453, section 3.2: softmax weights add up to one, and models learn to leave
what they don't need on the first tokens; a window that drops them breaks. Positions are places inside the cache, as
published, or with ``original`` those of the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvopt.cache.policies.base import WHAT, DecodeRule, Policy, Tokens, built_in
from kvopt.grammar import take_number, take_word


@built_in("sink")
@dataclass(frozen=True)
class Sink(Policy):
    """The first tokens and the newest stay.

    Args:
        first: how many first tokens stay, the attention sinks.
        original: keep original positions; otherwise positions are those inside the cache, as published.
    """

    first: int = 4
    original: bool = False
    options: ClassVar[tuple[str, ...]] = ("s", "orig")
    positions_only: ClassVar[bool] = True

    @property
    def sinks(self) -> int:
        """None appear elsewhere with original positions."""
        return 0 if self.original else self.first

    @property
    def minimum(self) -> int:
        """The sinks and the newest token."""
        return self.first + 1

    @property
    def decode(self) -> DecodeRule:
        """The oldest behind the sinks leaves."""
        return DecodeRule(order=0, first=self.first)

    def priority(self, tokens: Tokens) -> torch.Tensor:
        """The sinks, then the newest first."""
        return tokens.positions.masked_fill(tokens.positions < self.first, torch.iinfo(torch.int32).max)

    @classmethod
    def from_settings(cls, settings: dict[str, int | bool], text: str) -> Sink:
        """``_s4`` and ``_orig``."""
        first = take_number(settings, "s", 4, 1, 1024, what=WHAT, text=text)
        assert first is not None
        return cls(first, take_word(settings, "orig", what=WHAT, text=text))

    def settings(self) -> str:
        """``_s4`` or ``_s4_orig``."""
        return f"_s{self.first}" + ("_orig" if self.original else "")
