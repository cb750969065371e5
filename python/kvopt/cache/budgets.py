# SPDX-License-Identifier: Apache-2.0
"""How many tokens stay. A budget turns the lengths of a batch of prompts into tokens per row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

MIB = 2**20
Cost = Callable[[Sequence[int]], int]
"""Bytes of the whole cache if its rows keep so many tokens per KV head, scales and bookkeeping included."""


@dataclass(frozen=True)
class TokenBudget:
    """``_b256``: this many tokens per KV head, in every row."""

    tokens: int

    def per_row(self, lengths: Sequence[int], minimum: int, cost: Cost) -> list[int]:
        """Tokens each row may keep; ``lengths`` are the unpadded lengths of its prompts."""
        return [self.tokens] * len(lengths)

    def __str__(self) -> str:
        return f"_b{self.tokens}"


@dataclass(frozen=True)
class PercentBudget:
    """``_p20``: per cent of the row's own prompt, rounded down, at least what the policy needs.

    The prompt is what the first forward of a sequence brings. The budget stays fixed from then on.
    """

    percent: int

    def per_row(self, lengths: Sequence[int], minimum: int, cost: Cost) -> list[int]:
        """Tokens each row may keep."""
        return [max(minimum, length * self.percent // 100) for length in lengths]

    def __str__(self) -> str:
        return f"_p{self.percent}"


@dataclass(frozen=True)
class MebibyteBudget:
    """``_mb64``: as many tokens as fit into this many MiB for the whole cache, all rows of the batch together."""

    mebibytes: int

    def per_row(self, lengths: Sequence[int], minimum: int, cost: Cost) -> list[int]:
        """Raises ValueError if not even the policy's minimum fits."""
        rows, room = len(lengths), self.mebibytes * MIB
        least = cost([minimum] * rows)
        if least > room:
            raise ValueError(
                f"cache budget mb{self.mebibytes}: the policy needs {minimum} tokens in each of {rows} rows, "
                f"{least} bytes: mb{-(-least // MIB)} or more"
            )
        # Between a number that fits and one that doesn't. A group more or less moves the bytes up and down a little.
        fits, misses = minimum, 2 * minimum
        while cost([misses] * rows) <= room:
            fits, misses = misses, 2 * misses
        while misses - fits > 1:
            middle = (fits + misses) // 2
            fits, misses = (middle, misses) if cost([middle] * rows) <= room else (fits, middle)
        return [fits] * rows

    def __str__(self) -> str:
        return f"_mb{self.mebibytes}"


Budget = TokenBudget | PercentBudget | MebibyteBudget
