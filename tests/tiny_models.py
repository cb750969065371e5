# SPDX-License-Identifier: Apache-2.0
"""Random models of a few thousand weights, for tests that load and save whole folders."""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

VOCABULARY = 96


def tiny_llama(
    tied: bool = False, dtype: torch.dtype = torch.float32, **settings: object
) -> LlamaForCausalLM:
    """Two layers of 64 columns, 192 in the MLP; every linear has a bias but the head."""
    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "attention_bias": True,
        "mlp_bias": True,
    }
    # not .to(dtype), which would round the rotary frequencies too, as loading does not
    model = LlamaForCausalLM._from_config(LlamaConfig(**(config | settings)), dtype=dtype)
    return _random_biases(model).eval()


def tiny_gpt2() -> GPT2LMHeadModel:
    """Two layers of 64 columns, of ``Conv1D``, with a tied head."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    return _random_biases(GPT2LMHeadModel(config)).eval()


def _random_biases(model: torch.nn.Module) -> torch.nn.Module:
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Those of a forward pass, without gradients."""
    with torch.no_grad():
        return model(tokens).logits


def some_tokens() -> torch.Tensor:
    """(2, 11) random token numbers."""
    return torch.randint(0, VOCABULARY, (2, 11))
