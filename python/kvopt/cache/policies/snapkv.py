# SPDX-License-Identifier: Apache-2.0
"""snapkv: what the last queries of the prompt look at stays.

Li et al. 2024, arXiv:2404.14469, section 4: the attention of the last w queries, an observation window, is summed per
token and averaged over k neighbours; the tokens with the highest scores stay, and the window itself.

As published the cache then grows with every generated token (``grow``). Otherwise the budget holds: tokens from the
window on are worth more than any before it, the lowest score before it makes room, and when none is left the oldest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvopt.cache.policies.base import WHAT, DecodeRule, Observation, Policy, Tokens, built_in
from kvopt.grammar import take_number, take_word


@built_in("snapkv")
@dataclass(frozen=True)
class SnapKV(Policy):
    """What the newest queries look at.

    Args:
        window: observed queries, w.
        kernel: neighbours averaged, k, odd; 1 for none.
        grow: evict nothing after the prompt.

    Raises:
        ValueError: an even ``kernel``.
    """

    window: int = 32
    kernel: int = 5
    grow: bool = False
    options: ClassVar[tuple[str, ...]] = ("w", "k", "grow")

    def __post_init__(self) -> None:
        if self.kernel % 2 == 0:
            raise ValueError(f"snapkv: the pooling kernel must be odd, got k{self.kernel}")

    @property
    def grows(self) -> bool:
        """As published."""
        return self.grow

    @property
    def minimum(self) -> int:
        """The window."""
        return self.window

    @property
    def observation(self) -> Observation:
        """The window's queries, pooled; the window stays."""
        return Observation(
            queries=self.window, pool=self.kernel if self.kernel > 1 else 0, protect=self.window
        )

    @property
    def decode(self) -> DecodeRule:
        """The lowest score leaves; new tokens stand above all of the prompt's."""
        return DecodeRule(order=1, new_score=float("inf"))

    def priority(self, tokens: Tokens) -> torch.Tensor:
        """The score: infinite from the window on."""
        assert tokens.scores is not None
        return tokens.scores

    @classmethod
    def from_settings(cls, settings: dict[str, int | bool], text: str) -> SnapKV:
        """``_w32``, ``_k5`` and ``_grow``."""
        window = take_number(settings, "w", cls.window, 1, 4096, what=WHAT, text=text)
        kernel = take_number(settings, "k", cls.kernel, 1, 4095, what=WHAT, text=text)
        assert window is not None and kernel is not None
        if kernel % 2 == 0:
            raise ValueError(f"{WHAT} {text!r}: setting 'k{kernel}' must be odd")
        return cls(window, kernel, take_word(settings, "grow", what=WHAT, text=text))

    def settings(self) -> str:
        """What differs from ``_w32_k5``, and ``_grow``."""
        window = "" if self.window == type(self).window else f"_w{self.window}"
        kernel = "" if self.kernel == type(self).kernel else f"_k{self.kernel}"
        return window + kernel + ("_grow" if self.grow else "")
