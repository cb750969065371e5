# SPDX-License-Identifier: Apache-2.0
"""How many tokens stay. A budget turns the lengths of a batch of prompts into tokens per row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class TokenCost:
    """Bytes a cache needs, summed over layers and heads.

    Attributes:
        token: bytes per kept token of one row, bookkeeping included.
        row: bytes per row whatever the budget.
    """

    token: int
    row: int


@dataclass(frozen=True)
class TokenBudget:
    """``_b256``: this many tokens per KV head, in every row."""

    tokens: int

    def per_row(self, lengths: Sequence[int], minimum: int, cost: TokenCost) -> list[int]:
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

    def per_row(self, lengths: Sequence[int], minimum: int, cost: TokenCost) -> list[int]:
        """Tokens each row may keep."""
        return [max(minimum, length * self.percent // 100) for length in lengths]

    def __str__(self) -> str:
        return f"_p{self.percent}"


@dataclass(frozen=True)
class MebibyteBudget:
    """``_mb64``: as many tokens as fit into this many MiB for the whole cache, all rows of the batch together."""

    mebibytes: int

    def per_row(self, lengths: Sequence[int], minimum: int, cost: TokenCost) -> list[int]:
        """Raises ValueError if not even the policy's minimum fits."""
        rows = len(lengths)
        tokens = (self.mebibytes * MIB // rows - cost.row) // cost.token
        if tokens < minimum:
            need = -(-rows * (cost.row + minimum * cost.token) // MIB)
            raise ValueError(
                f"cache budget mb{self.mebibytes}: {rows} rows at {cost.token} bytes per token have room for "
                f"{max(tokens, 0)} tokens each, the policy needs {minimum}: mb{need} or more"
            )
        return [tokens] * rows

    def __str__(self) -> str:
        return f"_mb{self.mebibytes}"


Budget = TokenBudget | PercentBudget | MebibyteBudget
