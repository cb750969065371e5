# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of the architectures that kvopt knows, and of some that it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

_COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_GPT2 = {"vocab_size": 96, "n_embd": 32, "n_inner": 80, "n_layer": 2, "n_head": 4, "n_positions": 64}
_OPT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "ffn_dim": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 16,  # linears in front of and behind the layers
    "pad_token_id": 1,
}
_GQA = {"num_key_value_heads": 2}
_GEMMA = {"head_dim": 8, "sliding_window": 8}
_MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 48,
}

# name: configuration class, model class, settings
_KNOWN: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**_COMMON, **_GQA}),
    "llama-mha-bias": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {**_COMMON, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_COMMON, **_GQA, "sliding_window": 8}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**_COMMON, "num_key_value_heads": 4}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_COMMON, **_GQA, "head_dim": 8}),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {**_COMMON, **_GQA}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**_COMMON, **_GQA, "head_dim": 8}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**_COMMON, **_GQA, **_GEMMA}),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**_COMMON, **_GQA, **_GEMMA, "sliding_window_pattern": 2},
    ),
    "phi": ("PhiConfig", "PhiForCausalLM", _COMMON),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", _COMMON),
    "opt": ("OPTConfig", "OPTForCausalLM", _OPT),
    "opt-post-norm": ("OPTConfig", "OPTForCausalLM", {**_OPT, "do_layer_norm_before": False}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT2),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _COMMON),
    "gpt_neox-serial": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**_COMMON, "use_parallel_residual": False}),
}
_UNKNOWN: dict[str, tuple[str, str, dict[str, Any]]] = {
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {**_COMMON, **_GQA}),
    "starcoder2": ("Starcoder2Config", "Starcoder2ForCausalLM", {**_COMMON, **_GQA}),
    "stablelm": ("StableLmConfig", "StableLmForCausalLM", {**_COMMON, **_GQA}),
    "granite": ("GraniteConfig", "GraniteForCausalLM", {**_COMMON, **_GQA, "residual_multiplier": 0.5}),
    "qwen2_moe": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM", {**_COMMON, **_GQA, **_MOE}),
}
KNOWN, UNKNOWN = list(_KNOWN), list(_UNKNOWN)


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of that family, its norms and biases random too, in evaluation mode."""
    config_class, model_class, settings = (_KNOWN | _UNKNOWN)[name]
    config = getattr(transformers, config_class)(**settings)
    model: nn.Module = getattr(transformers, model_class)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += torch.empty_like(parameter).uniform_(-0.4, 0.4)
            else:
                parameter.copy_(torch.randn_like(parameter) * 2 / parameter.shape[-1] ** 0.5)
    return model.to(dtype).eval()


class Routed(nn.Module):
    """A language model in no library's style: experts that are plain linears, of which the last never gets a token."""

    def __init__(self, experts: int = 3, width: int = 32) -> None:
        super().__init__()
        self.table = nn.Embedding(96, width)
        self.blocks = nn.ModuleList(_Experts(experts, width) for _ in range(2))
        self.out = nn.Linear(width, 96, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def get_output_embeddings(self) -> nn.Module:
        return self.out

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.table(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        logits: torch.Tensor = self.out(hidden)
        return logits


class _Experts(nn.Module):
    def __init__(self, experts: int, width: int) -> None:
        super().__init__()
        self.mix = nn.Linear(width, width)
        self.up = nn.ModuleList(nn.Linear(width, 48) for _ in range(experts))
        self.gate = nn.ModuleList(nn.Linear(width, 48) for _ in range(experts))
        self.down = nn.ModuleList(nn.Linear(48, width) for _ in range(experts))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.mix(hidden)
        choice = (hidden[..., 0] > 0).long()
        out = torch.zeros_like(hidden)
        for expert in choice.unique().tolist():
            rows = hidden[choice == expert]
            inner = self.up[expert](rows) * self.gate[expert](rows).sigmoid()
            out[choice == expert] = self.down[expert](inner)
        return hidden + out


class TwoStreams(nn.Module):
    """Its layers pass two hidden states on, so that they can't run singly."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.table = nn.Embedding(96, width)
        self.blocks = nn.ModuleList(_Pair(width) for _ in range(2))
        self.out = nn.Linear(width, 96, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        left = right = self.table(tokens)
        for block in self.blocks:
            left, right = block(left, right)
        logits: torch.Tensor = self.out(left + right)
        return logits


class _Pair(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.left(right).tanh(), self.right(left).tanh() + right


UNSTREAMED: list[Callable[[], nn.Module]] = [Routed, TwoStreams]
