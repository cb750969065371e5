# SPDX-License-Identifier: Apache-2.0
"""Decoding through a compressed cache beside transformers' DynamicCache: time a token, bytes, one forward a token."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

import kvopt
from journal import Journal

CACHES = [
    *("full", "full+fp8", "full+int8", "full+int4", "full+int2"),
    *("window_b256", "sink_b256_s4_orig", "sink_b256_s4", "tova_b256", "random_b256"),
    *("h2o_b256", "h2o_b256+ada", "h2o_b256+int4", "snapkv_b256", "pyramidkv_b256+ada+int4"),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="llama-6m")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument(
        "--prompts", nargs="+", type=int, default=[128, 1024, 4096], help="tokens of the prompt"
    )
    parser.add_argument("--tokens", type=int, default=48, help="tokens to decode a round")
    parser.add_argument("--caches", nargs="+", default=CACHES)


def run(args: argparse.Namespace, journal: Journal) -> list[dict[str, Any]]:
    from transformers import DynamicCache

    plain, _ = kvopt.load(args.model, device=args.device, dtype=args.dtype)
    ours, _ = kvopt.load(args.model, device=args.device, dtype=args.dtype)
    rows = []
    for prompt in args.prompts:
        tokens = torch.randint(
            2, ours.config.vocab_size, (args.batch, prompt + args.tokens), device=args.device
        )
        times: dict[str, list[float]] = {name: [] for name in ("DynamicCache", *args.caches)}
        sizes: dict[str, int] = {}
        logits: dict[str, torch.Tensor] = {}
        for number in range(args.rounds + 1):  # the first round warms up
            for name in times:
                if name == "DynamicCache":
                    cache: Any = DynamicCache(config=plain.config)
                    each, logits[name] = _decode(plain, cache, tokens, prompt)
                    sizes[name] = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
                else:
                    cache = kvopt.Cache(ours, name)
                    each, logits[name] = _decode(ours, cache, tokens, prompt)
                    sizes[name] = cache.nbytes()
                if number:
                    times[name].append(1e3 * statistics.median(each))
        if "full" in logits:
            error = (logits["full"] - logits["DynamicCache"]).norm() / logits["DynamicCache"].norm()
            if not error.item() < 1e-2:
                raise RuntimeError(f"full differs from DynamicCache: relative error {error.item():.3g}")
        base = statistics.median(times["DynamicCache"])
        rows += [
            {
                "case": "kv_cache",
                "model": args.model,
                "batch": args.batch,
                "prompt": prompt,
                "cache": name,
                "ms_per_token": statistics.median(values),
                "ms_min": min(values),
                "ms_max": max(values),
                "time_over_dynamic": statistics.median(values) / base,
                "cache_bytes": sizes[name],
            }
            for name, values in times.items()
        ]
    return rows


def _decode(model: Any, cache: Any, tokens: torch.Tensor, prompt: int) -> tuple[list[float], torch.Tensor]:
    """Seconds of each one-token forward, with mask and positions as ``generate`` passes them, and the last logits."""
    mask = torch.ones_like(tokens)
    model(tokens[:, :prompt], attention_mask=mask[:, :prompt], past_key_values=cache)
    seconds = []
    for t in range(prompt, tokens.shape[1]):
        positions = torch.full((tokens.shape[0], 1), t, device=tokens.device)
        _sync(tokens)
        start = time.perf_counter()
        output = model(
            tokens[:, t : t + 1],
            attention_mask=mask[:, : t + 1],
            position_ids=positions,
            past_key_values=cache,
        )
        _sync(tokens)
        seconds.append(time.perf_counter() - start)
    return seconds, output.logits.float()


def _sync(tokens: torch.Tensor) -> None:
    if tokens.is_cuda:
        torch.cuda.synchronize()
