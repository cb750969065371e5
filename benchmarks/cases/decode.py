# SPDX-License-Identifier: Apache-2.0
"""End to end: Hugging Face's own generate loop over a random Llama, plain and quantised, interleaved."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

import kvopt

# hidden, layers, heads, KV heads, head size, ffn
SHAPES = {
    "1b": (2048, 16, 32, 8, 64, 8192),
    "350m": (1024, 24, 16, 8, 64, 4096),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="1b", choices=list(SHAPES))
    parser.add_argument("--recipes", nargs="+", default=["bf16", "int8", "int4_g128", "int4_g128+head_int8"])
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=24, help="tokens to generate")


def random_llama(shape: str, device: str) -> Any:
    """A Llama of the given shape with random bf16 weights, vocabulary 8,192 and a tied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers, heads, kv_heads, head_dim, ffn = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device=device)
    model.model.rotary_emb = type(model.model.rotary_emb)(config, device=device)
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1)
        else:
            parameter.data.normal_(0, 0.02, generator=generator)
    return model.eval()


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    models = {}
    for recipe in args.recipes:
        model = random_llama(args.model, args.device)
        kvopt.quantize(model, recipe, progress=False)
        models[recipe] = model
    prompt = torch.randint(0, 8192, (1, args.prompt), device=args.device)

    def generate(model: Any, tokens: int) -> float:
        _sync(args.device)
        start = time.perf_counter()
        with torch.no_grad():
            model.generate(
                prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
            )
        _sync(args.device)
        return time.perf_counter() - start

    samples: dict[str, list[tuple[float, float]]] = {recipe: [] for recipe in models}
    for model in models.values():
        generate(model, 3)
    for _ in range(args.rounds):
        for recipe, model in models.items():
            first, whole = generate(model, 1), generate(model, args.tokens + 1)
            samples[recipe].append((first, args.tokens / (whole - first)))
    base = statistics.median(s[1] for s in samples[args.recipes[0]])
    return [
        {
            "case": "decode",
            "model": args.model,
            "recipe": recipe,
            "prefill_ms": 1e3 * statistics.median(s[0] for s in samples[recipe]),
            "decode_tok_s": statistics.median(s[1] for s in samples[recipe]),
            "decode_tok_s_min": min(s[1] for s in samples[recipe]),
            "decode_tok_s_max": max(s[1] for s in samples[recipe]),
            f"speedup_over_{args.recipes[0]}": statistics.median(s[1] for s in samples[recipe]) / base,
            "model_bytes": kvopt.model_nbytes(model),
        }
        for recipe, model in models.items()
    ]


def _sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
