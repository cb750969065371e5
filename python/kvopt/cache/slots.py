# SPDX-License-Identifier: Apache-2.0
"""Which token lies in which slot.

Slots are filled from 0 up, one column for all rows of the batch; a row with left padding, or with fewer tokens than the
others, has its empty slots at the front::

    row 0   | 0 1 2 3 4 5 6 7 |      numbers: logical positions
    row 1   | . . . 0 1 2 3 4 |      .: empty, `holes` = 3

so one number per row says which slots are empty, whatever the policy, and one mask serves all layers and heads. Once
all columns are in use, a new token takes the hole nearest to the filled part, or, in a row without holes, the slot of
the token with the lowest priority. Nothing here waits for the device, except :meth:`Rows.read`, once per prompt or
chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvopt.cache.codecs import BLOCK
from kvopt.cache.policies import Policy, Tokens


class Rows:
    """Per-row state, the same for all layers. Tensors live on the device, plain numbers are bounds known to the host.

    Attributes:
        count: (B,) int32, tokens seen by each row, padding excluded.
        holes: (B,) int32, empty slots at the front.
        reserve: (B,) int32, holes that stay empty because the row's own budget is smaller than the number of slots.
        capacity: slots, the largest of the rows' budgets; None without a budget.
        used: columns in use.
        fewest, most: bounds of ``count``.
        most_holes, most_reserve: upper bounds of ``holes`` and ``reserve``.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        self.count = torch.zeros(batch, dtype=torch.int32, device=device)
        self.holes = torch.zeros_like(self.count)
        self.reserve = torch.zeros_like(self.count)
        self.capacity: int | None = None
        self.used = self.fewest = self.most = self.most_holes = self.most_reserve = 0

    def limit(self, budgets: Sequence[int]) -> None:
        """Sets each row's own budget; the number of slots is the largest of them."""
        self.capacity = max(budgets)
        self.reserve = torch.tensor(
            [self.capacity - b for b in budgets], dtype=torch.int32, device=self.count.device
        )
        self.most_reserve = self.capacity - min(budgets)

    def read(self, *more: torch.Tensor) -> list[list[int]]:
        """``count``, ``holes`` and further (B,) tensors, brought to the host in one transfer."""
        rows: list[list[int]] = torch.stack([self.count, self.holes, *more]).tolist()
        return rows

    def mask(self) -> torch.Tensor | None:
        """(B, 1, 1, used) bool, True where a slot is filled; None if all are."""
        if self.most_holes == 0:
            return None
        columns = torch.arange(self.used, dtype=torch.int32, device=self.holes.device)
        return columns >= self.holes[:, None, None, None]

    def fill(self) -> torch.Tensor | None:
        """Gives each row that has one its next hole: (B, 1, 1) int64, -1 for the other rows; None if none has one."""
        if self.most_holes <= self.most_reserve:
            return None
        filling = self.holes > self.reserve
        hole = torch.where(filling, self.holes - 1, -1)
        self.holes = torch.where(filling, hole, self.holes)
        self.most_holes -= 1
        return hole.long()[:, None, None]

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keeps ``rows`` (int64) of the batch, in that order."""
        self.count, self.holes, self.reserve = (t.index_select(0, rows) for t in self.tensors())

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor held, for counting bytes."""
        return [self.count, self.holes, self.reserve]


class Slots:
    """The logical positions of one layer's slots, or of all layers' for a policy that looks at positions only.

    Attributes:
        positions: (B, G, S) int32, -1 where empty; G is 1 or the number of KV heads.
    """

    def __init__(self, batch: int, groups: int, slots: int | None, device: torch.device) -> None:
        self._grows = slots is None
        self.positions = torch.full((batch, groups, slots or 0), -1, dtype=torch.int32, device=device)

    def append(self, positions: torch.Tensor, at: int) -> None:
        """Writes (B, q) positions, -1 for padding, into columns ``at …``."""
        needed = at + positions.shape[1]
        if needed > self.positions.shape[2]:
            assert self._grows
            self.positions = _grown(self.positions, needed)
        self.positions.narrow(2, at, positions.shape[1]).copy_(positions[:, None, :])

    def choose(self, policy: Policy, tokens: Tokens, keep: int, rows: Rows) -> torch.Tensor:
        """Chooses what stays of the candidates and makes it the content of the first ``keep`` slots.

        Returns:
            (B, G, keep) int64 indices into the candidates, in the order of positions, holes first.
        """
        positions = tokens.positions
        best = _ranked(policy, tokens, lowest=True).topk(keep, dim=-1).indices
        chosen = positions.gather(-1, best)
        if rows.most_reserve:  # a row with a smaller budget leaves the rest of its slots empty
            rank = torch.arange(keep, dtype=torch.int32, device=positions.device)
            own = self.positions.shape[2] - rows.reserve
            chosen = chosen.masked_fill(rank >= own[:, None, None], -1)
        chosen, order = chosen.sort(dim=-1)
        if keep > self.positions.shape[2]:
            self.positions = _grown(self.positions, keep)
        self.positions.narrow(2, 0, keep).copy_(chosen)
        return best.gather(-1, order)

    def replace(
        self, policy: Policy, tokens: Tokens, position: torch.Tensor, hole: torch.Tensor | None
    ) -> torch.Tensor:
        """Makes room for one token per row and head, and notes its ``position`` (B,); all columns are in use.

        Args:
            policy: who decides.
            tokens: what lies in the slots.
            position: (B,) int32, of the new token.
            hole: what :meth:`Rows.fill` returned for this token.

        Returns:
            (B, G, 1) int64, the slot to write.
        """
        slot = _ranked(policy, tokens, lowest=False).argmin(dim=-1, keepdim=True)
        if hole is not None:
            slot = torch.where(hole >= 0, hole, slot)
        self.positions.scatter_(2, slot, position[:, None, None].expand(slot.shape))
        return slot

    def find(self, first: int) -> torch.Tensor:
        """(B, first) int64: the slots of positions 0 … first - 1; 0 for those that are not there."""
        wanted = torch.arange(first, dtype=torch.int32, device=self.positions.device)
        return (self.positions[:, :1] == wanted[None, :, None]).int().argmax(dim=-1)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keeps ``rows`` (int64) of the batch, in that order."""
        with torch.inference_mode(False):
            self.positions = self.positions.index_select(0, rows)


def _ranked(policy: Policy, tokens: Tokens, *, lowest: bool) -> torch.Tensor:
    """The policy's priorities with the empty slots made the first to go, or those never to be taken."""
    priority = policy.priority(tokens)
    if priority.shape != tokens.positions.shape:
        raise ValueError(
            f"cache policy {policy.name!r}: priority() returned shape {tuple(priority.shape)}, "
            f"expected {tuple(tokens.positions.shape)} (batch, heads, tokens)"
        )
    if tokens.full:
        return priority
    if priority.dtype.is_floating_point:
        extreme: float = float("-inf") if lowest else float("inf")
    else:
        info = torch.iinfo(priority.dtype)
        extreme = info.min if lowest else info.max
    return priority.masked_fill(tokens.positions < 0, extreme)


def _grown(positions: torch.Tensor, needed: int) -> torch.Tensor:
    batch, groups, have = positions.shape
    with torch.inference_mode(False):  # written in place later, perhaps outside the caller's inference mode
        grown = positions.new_full((batch, groups, -(-needed // BLOCK) * BLOCK), -1)
    grown.narrow(2, 0, have).copy_(positions)
    return grown
