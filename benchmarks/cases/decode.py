# SPDX-License-Identifier: Apache-2.0
"""End to end: Hugging Face's own generate loop over a random Llama, plain and quantised, interleaved."""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import Any

import torch

import kvopt
from kvopt.experiments import speed_model

SHAPES: dict[str, dict[str, int]] = {
    "1b": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
    },
    "350m": {},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="1b", choices=list(SHAPES))
    parser.add_argument("--recipes", nargs="+", default=["bf16", "int8", "int4_g128", "int4_g128+head_int8"])
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=24, help="tokens to generate")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    base_model = speed_model.build(args.seed, torch.bfloat16, args.device, **SHAPES[args.model])
    models = {}
    for recipe in args.recipes:
        models[recipe] = copy.deepcopy(base_model)
        kvopt.quantize(models[recipe], recipe, progress=False)
    del base_model
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
