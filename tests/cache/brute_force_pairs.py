# SPDX-License-Identifier: Apache-2.0
"""MiniCache written out from its definition, token by token in fp64, over the policies of ``brute_force_policies``.

Every token of a pair of layers is in a list of merged tokens, or in none. Merging overwrites its keys and values of
both layers, in the reference's own memory, by what the definition restores.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from cache.brute_force_policies import PolicyReference, Scores

BLOCK = 256


@dataclass
class PairReference(PolicyReference):
    """A model with one row whose layers from the middle up are merged in pairs.

    Args:
        retained: per cent that is not merged.
        t: per cent of the arc.
        bits: of the codec's integers; 0 for the model's type.
        group, residual: of the codec.

    Attributes:
        merged: ``[lower layer][head]`` positions in the order of their slots.
        scales: ``[lower layer][head]`` scale and minimum of each group of keys.
    """

    retained: int = 5
    t: int = 60
    bits: int = 0
    group: int = 1
    residual: int = 0
    merged: dict[int, list[list[int]]] = field(default_factory=dict)
    scales: dict[int, list[list[tuple[torch.Tensor, torch.Tensor]]]] = field(default_factory=dict)
    waiting: list[Scores] = field(default_factory=list)

    def lower(self, layer: int) -> int | None:
        """The lower layer of the pair that ``layer`` is in, None for no pair."""
        layers = self.decoder.layers
        upper = layer if layer % 2 else layer + 1
        return upper - 1 if upper < layers and upper >= layers // 2 else None

    def parts(self, lower: int, head: int, kept: int) -> tuple[int, int]:
        """Merged and unmerged tokens that the head has room for once ``kept`` tokens are to be there."""
        capacity = self.capacity[lower][head]
        if self.policy.grows:
            while capacity < kept:
                capacity += BLOCK
        unmerged = max(self.residual, self.group) - (-capacity * self.retained // 100)
        merged = max(0, capacity - unmerged) // self.group * self.group
        return merged, capacity - merged

    def prompt(self, ids: torch.Tensor, theirs: list[list[set[int]]]) -> torch.Tensor:
        """As the base says."""
        self.lowers: dict[int, list[Scores]] = {}
        logits = super().prompt(ids, theirs)
        for lower, scores in self.lowers.items():
            self.scores[lower] = scores
        return logits

    def _compress(self, layer: int, heads: list[Scores], theirs: list[set[int]]) -> list[Scores]:
        lower = self.lower(layer)
        if lower is None:
            return super()._compress(layer, heads, theirs)
        if layer == lower:
            self.waiting = heads
            return heads
        both = super()._compress(layer, self.waiting + heads, theirs)
        self.capacity[lower] = self.capacity[layer]
        if not self.policy.shared:  # lower, upper, lower, upper …
            both = both[::2] + both[1::2]
        self.lowers[lower], upper = both[: len(heads)], both[len(heads) :]
        self.merged[lower] = [[] for _ in heads]
        self.scales[lower] = [[] for _ in heads]
        for head, scores in enumerate(upper):
            chosen = sorted(scores)
            room = self.parts(lower, head, len(chosen))[1]
            count = -(-max(0, len(chosen) - room) // self.group) * self.group
            newest = min(max(self.residual, self.group), len(chosen) - count)
            self._merge(lower, head, self._nearest(lower, head, chosen[: len(chosen) - newest], count))
        return upper

    def _groups(self, heads: list[Scores]) -> list[list[Scores]]:
        half = len(heads) // 2
        if self.policy.shared or half < len(self.capacity[0]):
            return super()._groups(heads)
        return [[heads[head], heads[head + half]] for head in range(half)]

    def _make_room(self, layer: int, theirs: list[set[int]]) -> None:
        lower = self.lower(layer)
        if lower is None:
            super()._make_room(layer, theirs)
            return
        if layer != lower:
            return
        both = self.scores[lower] + self.scores[lower + 1]
        for index, members in enumerate(self._groups(both)):
            heads = range(len(both) // 2) if self.policy.shared else [index]
            held = len(members[0])
            victim = None
            if held == self.capacity[lower][index] and not self.policy.grows:
                victim = self._leaving(members, self.capacity[lower][index], theirs[index])
            for head in heads:
                merged = self.merged[lower][head]
                most, room = self.parts(lower, head, held + 1)
                if held - len(merged) < room:
                    assert victim is None
                    continue
                unmerged = sorted(set(self.scores[lower][head]) - set(merged))
                candidates = unmerged[: len(unmerged) - max(0, max(self.residual, self.group) - self.group)]
                if len(merged) + self.group <= most:
                    assert victim is None
                    self._merge(lower, head, self._nearest(lower, head, candidates, self.group))
                    continue
                assert victim is not None
                if victim in merged:
                    (other,) = self._nearest(lower, head, candidates, 1)
                    self._merge(lower, head, [other], merged.index(victim))
                for side in (lower, lower + 1):
                    del self.scores[side][head][victim]

    def _leaving(self, members: list[Scores], capacity: int, theirs: set[int]) -> int:
        worth = self._worth(members, capacity, self.length)
        victim = min(worth, key=worth.__getitem__)
        gone = set(members[0]) - theirs
        assert len(gone) == 1, f"token {self.length}: {sorted(gone)} left at once"
        (other,) = gone
        assert other == victim or self._equal(worth[other], worth[victim]), (
            f"token {self.length}: token {other} of worth {worth[other]} left, {victim} has {worth[victim]}"
        )
        self.ties += other != victim
        return other

    def _nearest(self, lower: int, head: int, candidates: list[int], count: int) -> list[int]:
        """Those of the smallest angle between keys, kept in fp32; the older of equal ones."""
        keys = [self.memory[layer][0][head] for layer in (lower, lower + 1)]
        order = sorted(candidates, key=lambda j: (np.float32(angle(keys[0][j], keys[1][j]) / np.pi), j))
        return sorted(order[:count])

    def _merge(self, lower: int, head: int, tokens: list[int], slot: int | None = None) -> None:
        """Replaces both layers' vectors by what is restored; ``slot`` is that of a token that left its group."""
        if not tokens:
            return
        merged = self.merged[lower][head]
        for kind in range(2):
            both = [self.memory[layer][kind][head] for layer in (lower, lower + 1)]
            directions = torch.stack([arc(both[0][j], both[1][j], self.t / 100) for j in tokens])
            if self.bits and kind == 0:
                directions = self._keys(lower, head, directions, slot)
            elif self.bits:
                parts = directions.split(self.group, dim=1)
                directions = torch.cat([coded(x, *span(x, self.bits, 1), self.bits) for x in parts], 1)
            for vectors in both:
                for j, direction in zip(tokens, directions, strict=True):
                    norm = torch.linalg.vector_norm(vectors[j])  # kept in fp32
                    vectors[j] = direction * norm.float().double()
        if slot is None:
            merged += tokens
        else:
            merged[slot] = tokens[0]

    def _keys(self, lower: int, head: int, keys: torch.Tensor, slot: int | None) -> torch.Tensor:
        """Per channel over whole groups of tokens, or with the scale of the group that ``slot`` is in."""
        scales = self.scales[lower][head]
        if slot is not None:
            return coded(keys, *scales[slot // self.group], self.bits)
        found = []
        for part in keys.split(self.group):
            scales.append(span(part, self.bits, 0))
            found.append(coded(part, *scales[-1], self.bits))
        return torch.cat(found)


def angle(a: torch.Tensor, b: torch.Tensor) -> float:
    """Between two vectors (D,)."""
    return float(torch.arccos((a @ b / (a.norm() * b.norm())).clamp(-1, 1)))


def arc(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """arXiv:2405.14366, section 3: the unit vector at the share ``t`` of the way from a to b."""
    omega = torch.arccos(a @ b / (a.norm() * b.norm()))
    return (torch.sin((1 - t) * omega) * a / a.norm() + torch.sin(t * omega) * b / b.norm()) / torch.sin(
        omega
    )


def span(x: torch.Tensor, bits: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum in fp16, of fp32 numbers."""
    x = x.float()
    low = x.amin(dim, keepdim=True)
    return ((x.amax(dim, keepdim=True) - low) / (2**bits - 1)).half(), low.half()


def coded(x: torch.Tensor, scale: torch.Tensor, low: torch.Tensor, bits: int) -> torch.Tensor:
    """What the codes of x stand for."""
    codes = ((x.float() - low.float()) / scale.float()).round().clamp(0, 2**bits - 1)
    return torch.where(scale == 0, 0, codes).double() * scale.double() + low.double()
