# SPDX-License-Identifier: Apache-2.0
"""Every policy written out from its definition, token by token in fp64, sharing no code with the package.

A model is computed one row at a time. Keys and values of all tokens are kept for ever; per layer and KV head a
dictionary ``{position: score}`` says which of them may be seen. Where two scores are equal up to rounding, either
choice is right: then, and only then, the choice of the implementation under test is adopted, so that the comparison
can go on.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from cache.brute_force import rope

INFINITY = math.inf
Scores = dict[int, float]
Worth = tuple[int, float, int]
Kept = list[list[set[int]]]  # [layer][KV head] -> positions


@dataclass
class Definition:
    """A policy's definition.

    Attributes:
        prompt: (weights (Hq, T, T), keys (H, T, D), layer) -> score of each token per KV head, before protection.
        shared: the heads of a layer keep the same tokens, scores summed.
        recent: capacity -> how many newest tokens never leave, the arriving one included.
        fixed: first tokens that never leave.
        update: what the attention of a decoded token does to a score: (score, weight summed over the group) -> score.
        arriving: (layer, head, position) -> score of a new token.
        compare: (score, position, position of the arriving token) -> what is compared; the smallest leaves.
        grows: nothing leaves after the prompt.
        second_reading: scores come from reading the prompt a second time.
    """

    prompt: Callable[[torch.Tensor, torch.Tensor, int], list[Scores]]
    shared: bool = False
    recent: Callable[[int], int] = lambda capacity: 0
    fixed: int = 0
    update: Callable[[float, float], float] = lambda score, weight: score
    arriving: Callable[[int, int, int], float] = lambda layer, head, position: 0.0
    compare: Callable[[float, int, int], float] = lambda score, position, arriving: score
    grows: bool = False
    second_reading: bool = False


def window(sinks: int = 0) -> Definition:
    """The newest tokens, behind ``sinks`` first ones."""
    return Definition(
        prompt=lambda weights, keys, layer: [dict.fromkeys(range(keys.shape[1]), 0.0) for _ in keys],
        compare=lambda score, position, arriving: float(position),
        fixed=sinks,
    )


def h2o(recent: int | None = None, age: bool = False) -> Definition:
    """Column sums of the softmax over all queries."""

    def prompt(weights: torch.Tensor, keys: torch.Tensor, layer: int) -> list[Scores]:
        groups = weights.view(keys.shape[0], -1, *weights.shape[1:])
        return [_scores(group.sum(dim=(0, 1))) for group in groups]

    return Definition(
        prompt=prompt,
        recent=lambda capacity: capacity - capacity // 2 if recent is None else recent,
        update=lambda score, weight: score + weight,
        compare=lambda score, position, arriving: score / (arriving - position) if age else score,
    )


def snapkv(width: int, kernel: int, grow: bool = False) -> Definition:
    """Attention of the last ``width`` queries, averaged over ``kernel`` neighbours before the window."""

    def prompt(weights: torch.Tensor, keys: torch.Tensor, layer: int) -> list[Scores]:
        total = keys.shape[1]
        before = max(0, total - width)
        groups = weights.view(keys.shape[0], -1, total, total)
        found = []
        for group in groups:
            raw = group[:, before:].sum(dim=(0, 1)).tolist()
            half = kernel // 2
            pooled = {
                j: sum(raw[i] for i in range(j - half, j + half + 1) if 0 <= i < before) / kernel
                for j in range(before)
            }
            found.append(pooled | dict.fromkeys(range(before, total), INFINITY))
        return found

    return Definition(prompt=prompt, arriving=lambda layer, head, position: INFINITY, grows=grow)


def tova() -> Definition:
    """Attention of the newest query, summed over all heads."""

    def prompt(weights: torch.Tensor, keys: torch.Tensor, layer: int) -> list[Scores]:
        groups = weights.view(keys.shape[0], -1, *weights.shape[1:])
        return [_scores(group[:, -1].sum(dim=0)) for group in groups]

    return Definition(prompt=prompt, shared=True, update=lambda score, weight: weight)


def random_draw(seed: int = 0, prompt_only: bool = False) -> Definition:
    """32-bit hashes; the newest 8 stay."""

    def number(layer: int, head: int, position: int) -> float:
        start = _murmur(_murmur(seed) + layer * 0x10001 + head)
        return (_murmur(position + start) // 256) / 2**24

    def prompt(weights: torch.Tensor, keys: torch.Tensor, layer: int) -> list[Scores]:
        return [{j: number(layer, h, j) for j in range(keys.shape[1])} for h in range(keys.shape[0])]

    def arriving(layer: int, head: int, position: int) -> float:
        return INFINITY if prompt_only else number(layer, head, position)

    return Definition(prompt=prompt, recent=lambda capacity: 8, arriving=arriving)


def keydiff(recent: int = 8) -> Definition:
    """Minus the cosine of a key and the mean direction of all keys."""

    def prompt(weights: torch.Tensor, keys: torch.Tensor, layer: int) -> list[Scores]:
        found = []
        for head in keys:
            directions = [key / key.norm() for key in head]
            mean = torch.stack(directions).mean(dim=0)
            cosines = [float(d @ mean / mean.norm()) for d in directions]
            total = len(cosines)
            found.append({j: INFINITY if j >= total - recent else -cosines[j] for j in range(total)})
        return found

    return Definition(prompt=prompt, arriving=lambda layer, head, position: INFINITY)


def kvzip() -> Definition:
    """The largest weight in a second reading."""
    return Definition(
        prompt=lambda weights, keys, layer: [],
        arriving=lambda layer, head, position: INFINITY,
        second_reading=True,
    )


def pyramid(budget: int, layers: int, prompt: int, minimum: int) -> list[int]:
    """PyramidKV: a line from 2m - m/20 behind ``minimum`` down to m/20, cut at the prompt; the sum is exact."""
    mean = budget - minimum
    if prompt <= budget or prompt < 2 * mean:
        return [budget] * layers
    top = min(Fraction(39, 20) * mean, Fraction(prompt - minimum))
    line = [top - Fraction(2 * layer, layers - 1) * (top - mean) for layer in range(layers)]
    whole = [math.floor(x) for x in line]
    for index in sorted(range(layers), key=lambda i: (whole[i] - line[i], i))[: mean * layers - sum(whole)]:
        whole[index] += 1
    return [minimum + x for x in whole]


def ada(worths: list[dict[int, Worth]], budget: int, minimum: int) -> list[int]:
    """AdaKV: each head's best ``minimum`` are in; the rest of heads × ``budget`` goes to the best of all."""
    if len(worths[0]) <= budget:
        return [budget] * len(worths)
    counts, others = [], []
    for head, worth in enumerate(worths):
        order = sorted(worth, key=worth.__getitem__, reverse=True)
        counts.append(min(minimum, len(order)))
        others += [(worth[j][:2], head) for j in order[minimum:]]
    others.sort(key=lambda pair: pair[0], reverse=True)
    for _, head in others[: len(worths) * budget - sum(counts)]:
        counts[head] += 1
    return counts


def _murmur(x: int) -> int:
    x %= 2**32
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) % 2**32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) % 2**32
    return x ^ (x >> 16)


def _scores(values: torch.Tensor) -> Scores:
    return dict(enumerate(values.tolist()))


@dataclass
class PolicyReference:
    """A model with one row, read through a policy.

    Args:
        model: Llama or GPT-2, any type; computed in fp64.
        policy: the definition.
        capacity: ``[layer][head]`` tokens that each may keep.
        ada: the heads of a layer share out what they may keep together; no head gets less than this many.
        tolerance: relative difference up to which two scores count as equal.

    Attributes:
        scores: ``[layer][head]`` dictionaries of what may be seen.
        ties: how often the implementation's choice between equal scores was adopted.
    """

    model: LlamaForCausalLM | GPT2LMHeadModel
    policy: Definition
    capacity: list[list[int]]
    ada: int | None = None
    tolerance: float = 1e-5
    scores: list[list[Scores]] = field(default_factory=list)
    ties: int = 0

    def __post_init__(self) -> None:
        self.decoder = Decoder(self.model)
        self.memory: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.length = 0

    @torch.no_grad()
    def prompt(self, ids: torch.Tensor, theirs: Kept) -> torch.Tensor:
        """Reads the prompt ``ids`` (T,), compresses, and returns the last token's logits (V,)."""
        hidden, found = self.decoder.embed(ids, 0), []
        for layer in range(self.decoder.layers):
            query, key, value = self.decoder.project(layer, hidden, 0)
            weights = attention_weights(query, key)
            hidden = self.decoder.finish(layer, hidden, weights @ _per_query_head(value, query))
            self.memory.append((key, value))
            found.append(self.policy.prompt(weights, key, layer))
        if self.policy.second_reading:
            found = self._read_again(ids)
        self.length = len(ids)
        self.scores = [self._compress(layer, heads, theirs[layer]) for layer, heads in enumerate(found)]
        return self.decoder.logits(hidden[-1:])[0]

    def _read_again(self, ids: torch.Tensor) -> list[list[Scores]]:
        """The prompt once more behind itself; the largest weight that each of its tokens gets from any query."""
        total = len(ids)
        hidden, found = self.decoder.embed(ids, total), []
        for layer in range(self.decoder.layers):
            query, key, value = self.decoder.project(layer, hidden, total)
            key, value = (
                torch.cat([old, new], 1) for old, new in zip(self.memory[layer], (key, value), strict=True)
            )
            weights = attention_weights(query, key)
            hidden = self.decoder.finish(layer, hidden, weights @ _per_query_head(value, query))
            groups = weights.view(key.shape[0], -1, *weights.shape[1:])
            found.append([_scores(group[:, :, :total].amax(dim=(0, 1))) for group in groups])
        return found

    @torch.no_grad()
    def step(self, token: int, theirs: Kept) -> torch.Tensor:
        """Reads one token and returns its logits (V,); ``theirs`` is what the implementation then held."""
        position = self.length
        hidden = self.decoder.embed(torch.tensor([token]), position)
        for layer in range(self.decoder.layers):
            query, key, value = self.decoder.project(layer, hidden, position)
            keys, values = (
                torch.cat([old, new], 1) for old, new in zip(self.memory[layer], (key, value), strict=True)
            )
            self.memory[layer] = (keys, values)
            self._make_room(layer, theirs[layer])
            groups = query.shape[0] // key.shape[0]
            mixed = torch.empty_like(query)
            for head, scores in enumerate(self.scores[layer]):
                scores[position] = self.policy.arriving(layer, head, position)
                seen = sorted(scores)
                rows = slice(head * groups, (head + 1) * groups)
                weights = (query[rows, 0] @ keys[head, seen].T / query.shape[-1] ** 0.5).softmax(-1)
                mixed[rows, 0] = weights @ values[head, seen]
                for j, weight in zip(seen, weights.sum(0).tolist(), strict=True):
                    scores[j] = self.policy.update(scores[j], weight)
            hidden = self.decoder.finish(layer, hidden, mixed)
        self.length += 1
        return self.decoder.logits(hidden)[0]

    def kept(self) -> Kept:
        """``[layer][head]`` sets of positions."""
        return [[set(scores) for scores in layer] for layer in self.scores]

    def _groups(self, heads: list[Scores]) -> list[list[Scores]]:
        """Heads that keep the same tokens, together."""
        return [heads] if self.policy.shared else [[scores] for scores in heads]

    def _compress(self, layer: int, heads: list[Scores], theirs: list[set[int]]) -> list[Scores]:
        found: list[Scores] = []
        worths = [
            self._worth(members, self.capacity[layer][index], self.length - 1)
            for index, members in enumerate(self._groups(heads))
        ]
        if self.ada is not None:
            self.capacity[layer] = ada(worths, self.capacity[layer][0], self.ada)
        for index, (members, worth) in enumerate(zip(self._groups(heads), worths, strict=True)):
            capacity = self.capacity[layer][index]
            order = sorted(worth, key=worth.__getitem__, reverse=True)
            kept, other = set(order[:capacity]), theirs[index]
            assert len(other) == len(kept), f"layer {layer}, head {index}: {len(other)} kept, not {len(kept)}"
            for j in sorted(kept ^ other):
                assert self._equal(worth[j], worth[order[len(kept) - 1]]), (
                    f"layer {layer}, head {index}: token {j} is worth {worth[j]}, the last to stay "
                    f"{worth[order[len(kept) - 1]]}; only here {sorted(kept - other)}, there {sorted(other - kept)}"
                )
            self.ties += kept != other
            found += [{j: scores[j] for j in sorted(other)} for scores in members]
        return found

    def _make_room(self, layer: int, theirs: list[set[int]]) -> None:
        for index, members in enumerate(self._groups(self.scores[layer])):
            capacity = self.capacity[layer][index]
            if self.policy.grows or len(members[0]) < capacity:
                continue
            worth = self._worth(members, capacity, self.length)
            victim = min(worth, key=worth.__getitem__)
            gone = set(members[0]) - theirs[index]
            where = f"layer {layer}, head {index}, token {self.length}"
            assert len(gone) == 1, f"{where}: {sorted(gone)} left at once"
            (other,) = gone
            assert other == victim or self._equal(worth[other], worth[victim]), (
                f"{where}: token {other} of worth {worth[other]} left, {victim} has {worth[victim]}"
            )
            self.ties += other != victim
            for scores in members:
                del scores[other]

    def _worth(self, members: list[Scores], capacity: int, newest: int) -> dict[int, Worth]:
        """What is compared: protection, then the policy's measure, then age. The arriving token comes after all."""
        recent = self.policy.recent(capacity)
        arriving = self.length
        found = {}
        for j in members[0]:
            rank = 2 if j < self.policy.fixed else 1 if j > newest - recent else 0
            score = sum(scores[j] for scores in members)
            found[j] = (rank, 0.0 if rank else self.policy.compare(score, j, arriving), j)
        return found

    def _equal(self, a: Worth, b: Worth) -> bool:
        """Equal up to rounding. Infinite scores, and protected tokens, are told apart by their age, exactly."""
        if a[0] or b[0] or not (math.isfinite(a[1]) and math.isfinite(b[1])):
            return a == b
        return abs(a[1] - b[1]) <= self.tolerance * max(abs(a[1]), abs(b[1]))


class Decoder:
    """The layers of a small Llama or GPT-2, in fp64."""

    def __init__(self, model: LlamaForCausalLM | GPT2LMHeadModel) -> None:
        self.model: Any = copy.deepcopy(model).double()
        self.llama = isinstance(model, LlamaForCausalLM)
        self.layers = model.config.num_hidden_layers
        self.blocks = self.model.model.layers if self.llama else self.model.transformer.h

    def embed(self, ids: torch.Tensor, start: int) -> torch.Tensor:
        """(T, d) for tokens at positions ``start …``."""
        if self.llama:
            return self.model.model.embed_tokens.weight[ids]
        decoder = self.model.transformer
        return decoder.wte.weight[ids] + decoder.wpe.weight[start : start + len(ids)]

    def project(self, layer: int, hidden: torch.Tensor, start: int) -> list[torch.Tensor]:
        """Queries (Hq, T, D), keys and values (H, T, D), with RoPE."""
        block, config = self.blocks[layer], self.model.config
        if not self.llama:
            every = block.attn.c_attn(block.ln_1(hidden))
            return list(every.view(len(hidden), 3, config.n_head, -1).permute(1, 2, 0, 3))
        normed, attention = block.input_layernorm(hidden), block.self_attn
        query, key, value = (
            linear(normed).view(len(hidden), -1, config.head_dim).transpose(0, 1)
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        places = torch.arange(start, start + len(hidden))
        theta = config.rope_parameters["rope_theta"]
        return [rope(query, places, theta), rope(key, places, theta), value]

    def finish(self, layer: int, hidden: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """The rest of a layer behind attention's output (Hq, T, D)."""
        block, flat = self.blocks[layer], mixed.transpose(0, 1).flatten(1)
        if self.llama:
            hidden = hidden + block.self_attn.o_proj(flat)
            return hidden + block.mlp(block.post_attention_layernorm(hidden))
        hidden = hidden + block.attn.c_proj(flat)
        return hidden + block.mlp(block.ln_2(hidden))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(T, V)."""
        norm = self.model.model.norm if self.llama else self.model.transformer.ln_f
        return self.model.lm_head(norm(hidden))


def attention_weights(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """(Hq, q, n): softmax over the keys up to each query, the last query standing at the last key."""
    n, q = key.shape[1], query.shape[1]
    logits = query @ _per_query_head(key, query).transpose(1, 2) / query.shape[-1] ** 0.5
    unseen = torch.arange(n)[None] > torch.arange(n - q, n)[:, None]
    return logits.masked_fill(unseen, -INFINITY).softmax(-1)


def _per_query_head(vectors: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    return vectors.repeat_interleave(query.shape[0] // vectors.shape[0], 0)
