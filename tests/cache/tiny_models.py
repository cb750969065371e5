# SPDX-License-Identifier: Apache-2.0
"""Small random models, and one forward at a time written out so that a test can look at every step."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

VOCABULARY = 96


def tiny_llama(
    groups: int = 2, dtype: torch.dtype = torch.float32, layers: int = 2, **settings: Any
) -> LlamaForCausalLM:
    """Two KV heads with ``groups`` query heads each. Large weights, so that attention is not uniform."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=2 * groups,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        initializer_range=0.15,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
        **settings,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def tiny_gpt2(dtype: torch.dtype = torch.float32, positions: int = 2048) -> GPT2LMHeadModel:
    """Two layers, four heads, learned positions that matter."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=positions,
        initializer_range=0.15,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
    )
    return GPT2LMHeadModel(config).to(dtype).eval()


def random_ids(rows: int, tokens: int) -> torch.Tensor:
    """(rows, tokens) random tokens, none of them padding."""
    return torch.randint(1, VOCABULARY, (rows, tokens))


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Puts prompts (1, T_r) into one batch; returns ids and attention mask, (B, T) each."""
    longest = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0)) for row in rows])
    mask = torch.cat([(torch.arange(longest) >= longest - row.shape[1]).long()[None] for row in rows])
    return ids, mask


@torch.no_grad()
def run_forced(
    model: PreTrainedModel,
    cache: Any,
    prompt: torch.Tensor,
    continuation: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits (B, 1 + q, V) after the prompt and after each forced token of ``continuation`` (B, q)."""
    logits = [model(prompt, attention_mask=mask, past_key_values=cache, use_cache=True).logits[:, -1:]]
    for token in continuation.T:
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones((mask.shape[0], 1))], dim=1)
        logits.append(
            model(token[:, None], attention_mask=mask, past_key_values=cache, use_cache=True).logits
        )
    return torch.cat(logits, dim=1)


TINY = {"llama": tiny_llama, "gpt2": tiny_gpt2}
