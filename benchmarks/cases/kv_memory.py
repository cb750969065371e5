# SPDX-License-Identifier: Apache-2.0
"""Bytes of a compressed cache while it generates: predicted, counted, given by the allocator; DynamicCache beside it.

``peak`` is the most over what the model's own forward over the same tokens takes without a cache, ``bound`` what was
predicted for it. On the CPU the allocator is watched event by event, on CUDA by ``torch.cuda``'s statistics.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch

import kvopt
from journal import Journal
from kvopt.experiments.allocations import allocations
from kvopt.experiments.memory import cache_nbytes

CACHES = [
    *("full", "full+fp8", "full+int8", "full+int4", "full+int2", "window_b256", "sink_b256_s4", "tova_b256"),
    *("random_b256", "keydiff_b256", "h2o_b256", "h2o_b256+ada", "h2o_b256+int4", "snapkv_b256"),
    *("snapkv_b256_grow", "pyramidkv_b256+int4", "kvzip_b256"),
    *("full+minicache", "full+minicache+int4", "h2o_b256+minicache"),
]
COLUMNS = (
    *("prompt", "prefill", "contender", "predicted_mib", "held_mib", "allocator_mib", "held_over_dynamic"),
    *("peak_mib", "bound_mib", "grown_per_token", "freed"),
)
MIB = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="llama-6m")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--prompts", nargs="+", type=int, default=[2048], help="tokens of the prompt")
    parser.add_argument("--prefills", nargs="+", default=["full", "512"], help="'full' or tokens of a chunk")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to decode")
    parser.add_argument("--caches", nargs="+", default=CACHES)


def run(args: argparse.Namespace, journal: Journal) -> Iterator[dict[str, Any]]:
    from transformers import __version__

    model, _ = kvopt.load(args.model, device=args.device, dtype=args.dtype)
    journal.versions = {"DynamicCache": f"transformers {__version__}", "ours": f"kvopt {kvopt.__version__}"}
    for prompt in args.prompts:
        shape = (args.batch, prompt + args.tokens)
        tokens = torch.randint(2, model.config.vocab_size, shape, device=args.device)
        model(tokens[:, :prompt], use_cache=False, logits_to_keep=1)  # what libraries allocate once
        dynamic = None
        for prefill in args.prefills:
            for name in ("DynamicCache", *args.caches):
                if name == "DynamicCache" and prefill != "full":
                    continue  # transformers' generate may read in chunks; a cache of its own does not
                try:
                    row = _measure(model, tokens, prompt, name, prefill)
                except ValueError as error:  # pairs that kvopt refuses, as ada + codec in chunks
                    journal.leave_out(name, error, f"prefill {prefill}")
                    continue
                if name == "DynamicCache":
                    dynamic = row["held"]
                yield {
                    "case": "kv_memory",
                    "model": args.model,
                    "dtype": args.dtype,
                    "batch": args.batch,
                    "tokens": args.tokens,
                    "held_over_dynamic": row["held"] / dynamic if dynamic else None,
                    **row,
                    **{
                        f"{key}_mib": None if row[key] is None else row[key] / MIB
                        for key in ("predicted", "held", "allocator", "peak", "bound")
                    },
                }


def _measure(model: Any, tokens: torch.Tensor, prompt: int, name: str, prefill: str) -> dict[str, Any]:
    """One prompt, and its tokens one by one."""
    from transformers import DynamicCache

    rows, new = tokens.shape[0], tokens.shape[1] - prompt
    chunk: str | int = prefill if prefill == "full" else int(prefill)
    second = name.startswith("kvzip")  # reads the prompt again, up to 1024 tokens at once
    read = prompt if isinstance(chunk, str) else min(prompt, max(chunk, 1024 if second else 0))
    with allocations(tokens.device) as seen:
        model(tokens[:, :read], use_cache=False, logits_to_keep=1)
        seen.mark("without")
        model(tokens[:, :1], use_cache=False)
        seen.mark("token")
    ours = name != "DynamicCache"
    with allocations(tokens.device) as spans:
        cache: Any = kvopt.Cache(model, name, chunk) if ours else DynamicCache(config=model.config)
        model(tokens[:, :prompt], past_key_values=cache, use_cache=True, logits_to_keep=1)
        spans.mark("prompt")
        for t in range(prompt, tokens.shape[1]):
            model(tokens[:, t : t + 1], past_key_values=cache, use_cache=True)
            if t == prompt:
                spans.mark("first")
        spans.mark("decode")
        held = cache_nbytes(cache)
        if ours:
            cache.reset()
        cache = None
        spans.mark("freed")
    expected = kvopt.cache_bytes(model, name, rows, prompt, new, chunk) if ours else None
    if expected is not None and expected.exact and expected.steady != held:
        raise RuntimeError(f"{name}: predicted {expected.steady} bytes, it holds {held}")
    return {
        "prompt": prompt,
        "prefill": prefill,
        "contender": name,
        "predicted": None if expected is None else expected.steady,
        "held": held,
        "allocator": spans["decode"].held,
        "blocks": spans["decode"].blocks,
        "peak": max(
            spans["prompt"].peak - seen["without"].peak,
            max(spans["first"].peak, spans["decode"].peak) - seen["token"].peak,
        ),
        "bound": None if expected is None else expected.peak,
        "prompt_peak_all": spans["prompt"].peak,
        "prompt_peak_without": seen["without"].peak,
        "peak_blocks": spans["prompt"].peak_blocks,
        "grown_per_token": (spans["decode"].held - spans["first"].held) / max(1, new - 1),
        "freed": spans["decode"].held - spans["freed"].held,
    }
