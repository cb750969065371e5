# SPDX-License-Identifier: Apache-2.0
"""A seeded random-weight Llama of some 350 million parameters, for speed only.

Decoding a model of a few million parameters is bound by Python, not by memory, and shows nothing of what fewer bytes
per weight buy. This one is large enough, takes seconds to build and needs no download. Its answers mean nothing.
"""

from __future__ import annotations

from typing import Any

import torch

NAME = "random-llama-350m"


def build(seed: int = 0, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", **changes: int) -> Any:
    """Builds it: 24 layers, d 1024, 16 query and 8 KV heads of 64, ffn 3584, tied head over 8192 tokens: 348 M.

    Args:
        seed: of the weights.
        dtype: of the weights; they are drawn in this type.
        device: where they are drawn and stay.
        changes: fields of ``LlamaConfig`` to set otherwise.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        **{
            "vocab_size": 8192,
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "intermediate_size": 3584,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
            **changes,
        }
    )
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()
