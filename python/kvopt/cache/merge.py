# SPDX-License-Identifier: Apache-2.0
"""minicache: neighbouring layers that share one direction per token and keep their own magnitudes.

MiniCache (Liu et al. 2024, arXiv:2405.14366, section 3). From the middle layer up, layers are taken in pairs. A token's
key in both becomes one direction on the arc between the two (SLERP) and two norms, and so does its value. The newest
tokens, and those whose keys differ most in angle, stay as they are in each layer: they lie in the plain part of its
store. The packed part of the two stores is one, but for the norms (``factors``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvopt.cache.codecs import WHAT, Codec
from kvopt.grammar import reject_leftovers, take_number

MINICACHE = "minicache"


@dataclass(frozen=True)
class Merge:
    """How two layers are merged.

    Args:
        retained: per cent of the tokens, per KV head, that are not merged because their keys differ most, 0 to 100.
        t: where the common direction lies on the arc from the lower to the upper layer's, in per cent.
        recent: newest tokens that are not merged either; a codec's residual is one of its own.

    Raises:
        ValueError: per cent outside 0…100, or a negative number.
    """

    retained: int = 5
    t: int = 60
    recent: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.retained <= 100 and 0 <= self.t <= 100 and self.recent >= 0):
            raise ValueError(
                f"{MINICACHE}: k and t are per cent, 0…100, r a number of tokens, got k{self.retained}, t{self.t} and "
                f"r{self.recent}"
            )

    @classmethod
    def from_settings(cls, settings: dict[str, int | bool], text: str) -> Merge:
        """``_k5``, ``_t60`` and ``_r64``.

        Raises:
            ValueError: a number out of range, or another setting.
        """
        retained = take_number(settings, "k", cls.retained, 0, 100, what=WHAT, text=text)
        t = take_number(settings, "t", cls.t, 0, 100, what=WHAT, text=text)
        recent = take_number(settings, "r", cls.recent, 0, 2**16, what=WHAT, text=text)
        assert retained is not None and t is not None and recent is not None
        reject_leftovers(settings, MINICACHE, ["k", "t", "r"], what=WHAT, text=text)
        return cls(retained, t, recent)

    @property
    def share(self) -> float:
        """The setting t as the operators take it, 0 to 1."""
        return self.t / 100

    @staticmethod
    def pairs(layers: int) -> list[tuple[int, int]]:
        """The pairs (l - 1, l) of a model of so many layers: every odd l from the middle layer up."""
        return [(index - 1, index) for index in range(layers // 2, layers) if index % 2]

    @classmethod
    def pairs_of(cls, layers: int, model: str) -> list[tuple[int, int]]:
        """:meth:`pairs`; ValueError where there is none."""
        found = cls.pairs(layers)
        if not found:
            raise ValueError(
                f"{MINICACHE}: model type {model!r} has {layers} layers, fewer than one pair; leave {MINICACHE!r} out"
            )
        return found

    def residual(self, codec: Codec) -> int:
        """Newest tokens that are not merged, R': the setting or the codec's own, at least one group."""
        return max(self.recent, codec.residual, codec.group)

    def packed(self, capacities: torch.Tensor, codec: Codec) -> torch.Tensor:
        """Merged slots of segments for ``capacities`` (int64) tokens: whole groups, behind R' and k per cent."""
        unmerged = self.residual(codec) + (capacities * self.retained + 99) // 100
        return (capacities - unmerged).clamp(min=0) // codec.group * codec.group

    def most_plain(self, tokens: int, heads: int, codec: Codec) -> int:
        """Unmerged slots of ``heads`` segments that may hold ``tokens`` together, at most."""
        kept = (tokens * self.retained + 99 * heads) // 100
        return min(tokens, heads * (self.residual(codec) + codec.group - 1) + kept)

    def __str__(self) -> str:
        retained = f"_k{self.retained}" if self.retained != type(self).retained else ""
        t = f"_t{self.t}" if self.t != type(self).t else ""
        return MINICACHE + retained + t + (f"_r{self.recent}" if self.recent else "")
