# SPDX-License-Identifier: Apache-2.0
"""random: which tokens stay is drawn, except the newest 8. The control: a policy that chooses must do better.

What is drawn for a token depends on seed, layer, head and position alone, so it is the same on every device, in every
batch and however the prompt is cut. While decoding new tokens take part, so a question that follows the prompt loses
some of its own; with ``prompt`` only the prompt's are drawn, the fair control for policies that rank these alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch

from kvopt.cache.policies.base import WHAT, DecodeRule, Policy, Tokens, built_in
from kvopt.grammar import take_number, take_word

_RECENT = 8
_LOW32 = 0xFFFFFFFF


@built_in("random")
@dataclass(frozen=True)
class Random(Policy):
    """Tokens drawn without replacement, per layer and KV head.

    Args:
        seed: another seed, another draw.
        prompt: tokens that are decoded stand above those of the prompt.
    """

    seed: int = 0
    prompt: bool = False
    options: ClassVar[tuple[str, ...]] = ("seed", "prompt")

    @property
    def minimum(self) -> int:
        """The newest 8 and one that was drawn."""
        return _RECENT + 1

    @property
    def decode(self) -> DecodeRule:
        """The lowest number outside the newest 8 leaves."""
        return DecodeRule(order=1, recent=_RECENT, new_score=float("inf") if self.prompt else None)

    def scores_of(self, tokens: Tokens) -> torch.Tensor:
        """(B, H, n) float32 in [0, 1), 24 random bits each."""
        assert tokens.keys is not None
        heads = torch.arange(tokens.keys.shape[1], device=tokens.positions.device)
        start = _mix(_mix(self.seed) + tokens.layer * 0x10001 + heads)
        return (_mix(tokens.positions.long() + start[:, None]) >> 8).float() * 2.0**-24

    def priority(self, tokens: Tokens) -> torch.Tensor:
        """The newest 8, then by what was drawn."""
        assert tokens.scores is not None
        return tokens.scores.masked_fill(tokens.among_newest(_RECENT), float("inf"))

    @classmethod
    def from_settings(cls, settings: dict[str, int | bool], text: str) -> Random:
        """``_seed3`` and ``_prompt``."""
        seed = take_number(settings, "seed", 0, 0, 2**31 - 1, what=WHAT, text=text)
        assert seed is not None
        return cls(seed, take_word(settings, "prompt", what=WHAT, text=text))

    def settings(self) -> str:
        """``""``, ``_seed3``, ``_prompt`` or ``_seed3_prompt``."""
        return (f"_seed{self.seed}" if self.seed else "") + ("_prompt" if self.prompt else "")


Number = TypeVar("Number", int, torch.Tensor)


def _mix(x: Number) -> Number:
    """A bijection of 32-bit numbers, in int64, that leaves no pattern: the finaliser of MurmurHash3."""
    x = x & _LOW32
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _LOW32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _LOW32
    return x ^ (x >> 16)
