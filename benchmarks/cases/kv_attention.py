# SPDX-License-Identifier: Apache-2.0
"""Decode attention straight over the cache, per codec, beside torch's sdpa over the same tokens in the model's type.

``relative_error`` is against fp64 over the exact keys and values, so it holds the codec's rounding; what the kernel
does to the numbers that the store stands for is checked separately before anything is timed. ``+scores`` adds the
weights to the slots' scores. ``append`` is the step's other operator: one token into each segment, all of them full.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch

import kvopt
import timing
from compare import DTYPES
from journal import Journal
from kvopt import ops_kv, reference_kv
from kvopt.cache.codecs import Codec
from kvopt.cache.store import Shape, Store

CODECS = ("model", "fp8", "int8", "int4", "int2")
COLUMNS = (
    *("tokens", "heads", "query_heads", "dim", "contender", "median_us", "p10_us", "p90_us", "mb_read"),
    *("gb_per_s", "of_read_rate", "speedup", "relative_error"),
)
# Of data from the normal distribution.
ERRORS = {"model": 5e-3, "fp8": 0.05, "int8": 0.02, "int4": 0.2, "int2": 0.8}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 4096, 16384])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8, help="KV heads")
    parser.add_argument("--query-heads", type=int, default=32)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--codecs", nargs="+", choices=CODECS, default=list(CODECS))
    parser.add_argument(
        "--copies-mb", type=int, default=256, help="of caches, so that none is found in a cache"
    )


def run(args: argparse.Namespace, journal: Journal) -> Iterator[dict[str, Any]]:
    for tokens in args.tokens:
        yield from _rows(args, tokens, journal)


def _rows(args: argparse.Namespace, tokens: int, journal: Journal) -> Iterator[dict[str, Any]]:
    dtype, scale = DTYPES[args.dtype], args.dim**-0.5
    shape = (args.batch, args.heads, tokens, args.dim)
    keys, values = (torch.randn(shape, device=args.device).to(dtype) for _ in range(2))
    query = torch.randn(args.batch, args.query_heads, args.dim, device=args.device).to(dtype)
    token, position = keys[:, :, 0].contiguous(), torch.full((args.batch, 1), tokens, dtype=torch.int32)
    position = position.to(args.device)
    exact = _attention(query.double(), keys.double(), values.double(), scale)
    calls: dict[str, list[timing.Call]] = {}
    sizes, errors = {}, {}

    def enter(name: str, nbytes: int, make: Any, result: Any, bound: float) -> None:
        count = max(3, -(-args.copies_mb * 2**20 // nbytes))
        calls[name], sizes[name] = [make() for _ in range(count)], nbytes
        journal.versions[name] = (
            f"torch {torch.__version__}" if name == "sdpa" else f"kvopt {kvopt.__version__}"
        )
        if result is not None:
            errors[name] = float((result.double() - exact).norm() / exact.norm())
            if not errors[name] < bound:
                raise RuntimeError(f"{name} is wrong at {tokens} tokens: relative error {errors[name]:.3g}")

    def sdpa() -> timing.Call:
        k, v, q = keys.clone(), values.clone(), query[:, :, None]
        return lambda: torch.nn.functional.scaled_dot_product_attention(
            q, k, v, scale=scale, enable_gqa=args.query_heads != args.heads
        )

    enter("sdpa", keys.nbytes + values.nbytes, sdpa, sdpa()()[:, :, 0], ERRORS["model"])
    for name in args.codecs:
        store = _store(Codec.named(name), keys, values)
        nbytes = sum(t.nbytes for part, t in store.tensors().items() if part not in ("positions", "scores"))
        result = ops_kv.kv_attention_decode(query, store, scale)
        read = ops_kv.kv_quant_unpack(store, tokens)
        ours = _attention(query.double(), read[0].double(), read[1].double(), scale)
        if not float((result.double() - ours).norm() / ours.norm()) < ERRORS["model"]:
            raise RuntimeError(f"{name}: attention over codes is not attention over what they stand for")
        for suffix, update in (("", reference_kv.KEEP_SCORES), ("+scores", reference_kv.ADD_SCORES)):

            def attention(codec: str = name, update: int = update) -> timing.Call:
                own = _store(Codec.named(codec), keys, values)
                return lambda: ops_kv.kv_attention_decode(query, own, scale, update)

            enter(name + suffix, nbytes, attention, result, ERRORS[name])

        def append(codec: str = name) -> timing.Call:
            own = _store(Codec.named(codec), keys, values)
            return lambda: ops_kv.kv_evict_append(
                own, token, token, position, order=reference_kv.LOWEST_SCORE, first=4, recent=tokens // 2
            )

        enter(f"append {name}", nbytes, append, None, 0.0)
    timings, failures = timing.interleaved(calls, args.device, args.rounds, args.calls)
    for name, reason in failures.items():
        journal.fail(name, RuntimeError(reason), str(tokens))
    for name, t in timings.items():
        attends = not name.startswith("append")
        yield {
            "case": "kv_attention",
            "tokens": tokens,
            "batch": args.batch,
            "heads": args.heads,
            "query_heads": args.query_heads,
            "dim": args.dim,
            "dtype": args.dtype,
            "contender": name,
            "median_us": t.median_us,
            "p10_us": t.p10_us,
            "p90_us": t.p90_us,
            "mb_read": sizes[name] / 1e6 if attends else None,
            "gb_per_s": sizes[name] / t.median_us / 1e3 if attends else None,
            "of_read_rate": t.share_of_reading(sizes[name]) if attends else None,
            "speedup": timings["sdpa"].median_us / t.median_us if attends else None,
            "relative_error": errors.get(name),
            "copies": len(calls[name]),
        }


def _store(codec: Codec, keys: torch.Tensor, values: torch.Tensor) -> Store:
    """Full of these tokens, in the order of their positions, with random scores."""
    rows, heads, tokens, dim = keys.shape
    capacities = torch.full((rows, heads), tokens)
    store = Store.allocate(Shape(rows, heads, dim, keys.dtype, codec, scored=True), capacities, keys.device)
    at = torch.arange(tokens, dtype=torch.int32, device=keys.device).expand(rows, 1, tokens).contiguous()
    scores = torch.rand(rows, heads, tokens, device=keys.device)
    ops_kv.kv_quant_pack(store, keys, values, at, scores, at, capacities.int().to(keys.device))
    return store


def _attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    group = query.shape[1] // keys.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    weights = (torch.einsum("bhd,bhnd->bhn", query, k) * scale).softmax(-1)
    return torch.einsum("bhn,bhnd->bhd", weights, v)
