# SPDX-License-Identifier: Apache-2.0
"""Plain, slow statements of what the caches compute, sharing no code with them.

Keys and values of every token are kept for ever, keys before RoPE; what a policy would have evicted is found by index.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import GPT2LMHeadModel, LlamaForCausalLM


def kept_sets(prompt: int, total: int, budget: int, sinks: int) -> list[list[int]]:
    """For each token, what it may see, itself included, in increasing order. The prompt sees all before it."""
    sets = []
    for t in range(total):
        if t < prompt:
            sets.append(list(range(t + 1)))
        else:
            recent = range(max(sinks, t + 1 - (budget - sinks)), t + 1)
            sets.append(sorted({*range(min(sinks, t + 1)), *recent}))
    return sets


def kept_sets_by_chunks(starts: list[int], total: int, budget: int, sinks: int) -> list[list[int]]:
    """The same where chunks begin at ``starts``: a token sees what was kept before and its own chunk."""
    sets = []
    for start, end in zip(starts, [*starts[1:], total], strict=True):
        kept = sorted(
            {*range(min(sinks, start)), *range(max(0, min(sinks, start), start - (budget - sinks)), start)}
        )
        sets += [kept + list(range(start, t + 1)) for t in range(start, end)]
    return sets


@dataclass
class Reference:
    """A model computed token by token in fp64 or fp32, over the given sets of visible tokens.

    Attributes:
        sets: for each token, the tokens it sees.
        inside: positions are places in the set (StreamingLLM), otherwise those in the text.
    """

    model: LlamaForCausalLM | GPT2LMHeadModel
    sets: list[list[int]]
    inside: bool

    @torch.no_grad()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """(T, V) for ids (T,)."""
        step = self._llama if isinstance(self.model, LlamaForCausalLM) else self._gpt2
        layers = self.model.config.num_hidden_layers
        memory: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(layers)]
        return torch.stack([step(int(token), t, memory) for t, token in enumerate(ids)])

    def _places(self, t: int) -> tuple[torch.Tensor, int]:
        seen = self.sets[t]
        return (torch.arange(len(seen)), len(seen) - 1) if self.inside else (torch.tensor(seen), t)

    def _llama(
        self, token: int, t: int, memory: list[list[tuple[torch.Tensor, torch.Tensor]]]
    ) -> torch.Tensor:
        model = self.model.model
        config = self.model.config
        dim, groups = config.head_dim, config.num_attention_heads // config.num_key_value_heads
        places, own = self._places(t)
        hidden = model.embed_tokens.weight[token]
        for layer, past in zip(model.layers, memory, strict=True):
            normed = layer.input_layernorm(hidden)
            attention = layer.self_attn
            query = attention.q_proj(normed).view(-1, dim)
            past.append((attention.k_proj(normed).view(-1, dim), attention.v_proj(normed).view(-1, dim)))
            keys = torch.stack([past[j][0] for j in self.sets[t]]).transpose(0, 1)  # (H, n, D)
            values = torch.stack([past[j][1] for j in self.sets[t]]).transpose(0, 1)
            keys = rope(keys, places, config.rope_parameters["rope_theta"]).repeat_interleave(groups, 0)
            query = rope(query[:, None], torch.tensor([own]), config.rope_parameters["rope_theta"])
            weights = (query @ keys.transpose(1, 2) / dim**0.5).softmax(-1)
            hidden = hidden + attention.o_proj((weights @ values.repeat_interleave(groups, 0)).flatten())
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.model.lm_head(model.norm(hidden))

    def _gpt2(
        self, token: int, t: int, memory: list[list[tuple[torch.Tensor, torch.Tensor]]]
    ) -> torch.Tensor:
        model = self.model.transformer
        heads = self.model.config.n_head
        _, own = self._places(t)
        hidden = model.wte.weight[token] + model.wpe.weight[own]
        for layer, past in zip(model.h, memory, strict=True):
            query, key, value = layer.attn.c_attn(layer.ln_1(hidden)[None]).view(3, heads, -1)
            past.append((key, value))
            keys = torch.stack([past[j][0] for j in self.sets[t]]).transpose(0, 1)
            values = torch.stack([past[j][1] for j in self.sets[t]]).transpose(0, 1)
            weights = (query[:, None] @ keys.transpose(1, 2) / query.shape[-1] ** 0.5).softmax(-1)
            hidden = hidden + layer.attn.c_proj((weights @ values).flatten()[None])[0]
            hidden = hidden + layer.mlp(layer.ln_2(hidden)[None])[0]
        return self.model.lm_head(model.ln_f(hidden))


def rope(vectors: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    """RoPE as complex numbers: (H, n, D) at positions (n,)."""
    half = vectors.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.polar(
        torch.ones(len(positions), half, dtype=torch.float64), positions[:, None] * frequencies
    )
    turned = torch.complex(vectors[..., :half].double(), vectors[..., half:].double()) * turn
    return torch.cat([turned.real, turned.imag], dim=-1).to(vectors.dtype)
