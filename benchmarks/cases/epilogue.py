# SPDX-License-Identifier: Apache-2.0
"""What is fused around a product (bias, residual, input scale, low rank, SwiGLU) beside separate torch ops."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

import kvopt
import timing
from compare import DTYPES, SHAPES
from journal import Journal
from kvopt.weights import QuantizedWeight
from peers.ours import copies_of

COLUMNS = ("shape", "m", "recipe", "parts", "fused_us", "separate_us", "speedup", "plain_us", "difference")
Copy = tuple[QuantizedWeight, QuantizedWeight, QuantizedWeight]
# low rank comes with x @ down done: both sides are given it
PARTS = {
    "bias": ("bias",),
    "bias+residual": ("bias", "residual"),
    "input_scale": ("input_scale",),
    "low_rank": ("low_rank",),
    "swiglu": ("swiglu",),
    "all": ("bias", "residual", "input_scale", "low_rank", "swiglu"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", default=["8b_gate_up", "8b_o"], choices=list(SHAPES))
    parser.add_argument("--m", nargs="+", type=int, default=[1, 16, 256])
    parser.add_argument("--recipes", nargs="+", default=["int4_g128"])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: fp16 on CUDA, bf16 else")
    parser.add_argument("--copies-mb", type=int, default=320)


def run(args: argparse.Namespace, journal: Journal) -> Iterator[dict[str, Any]]:
    args.dtype = args.dtype or ("fp16" if args.device == "cuda" else "bf16")
    journal.versions["kvopt"] = kvopt.__version__
    for shape in args.shapes:
        for recipe in args.recipes:
            weights = _Weights(shape, recipe, args)
            for m in args.m:
                for parts in args.parts:
                    try:
                        yield _row(weights, m, parts, args)
                    except Exception as error:
                        journal.fail(f"{recipe} {parts}", error, f"{shape}, M = {m}")


class _Weights:
    """Copies of one weight, whole (gate's and up's rows alternating in eights) and in halves."""

    def __init__(self, shape: str, recipe: str, args: argparse.Namespace) -> None:
        self.shape, self.recipe = shape, recipe
        self.k, self.n = SHAPES[shape]
        self.dtype, self.device = DTYPES[args.dtype], args.device
        weight = (torch.randn(2, self.n // 2, self.k, device=args.device) / self.k**0.5).to(self.dtype)
        gate, up = (kvopt.quantize_weight(half, recipe) for half in weight)
        whole = QuantizedWeight.interleave_swiglu(gate, up)
        count = max(3, min(128, -(-args.copies_mb * 2**20 // whole.nbytes)))
        makers = [copies_of(w) for w in (whole, gate, up)]
        self.copies = [tuple(make() for make in makers) for _ in range(count)]


def _row(weights: _Weights, m: int, name: str, args: argparse.Namespace) -> dict[str, Any]:
    n, k, parts = weights.n, weights.k, PARTS[name]
    new = partial(torch.randn, device=weights.device, dtype=weights.dtype)
    x, bias, scale = new(m, k), new(n), new(k).abs() + 0.5
    low_x, low_w = new(m, args.rank), new(n, args.rank)
    residual = new(m, n // 2 if "swiglu" in parts else n)
    possible = {
        "bias": {"bias": bias},
        "residual": {"residual": residual},
        "input_scale": {"input_scale": scale},
        "low_rank": {"low_rank": (low_x, low_w)},
        "swiglu": {"swiglu": True},
    }
    extra: dict[str, Any] = {key: value for part in parts for key, value in possible[part].items()}

    def half(values: Tensor, i: int) -> Tensor:
        return values.view(n // 16, 2, 8, *values.shape[1:])[:, i].reshape(n // 2, *values.shape[1:])

    halves = [(half(bias, i), half(low_w, i)) for i in (0, 1)]

    def separate(copy: Copy) -> Tensor:
        given = x * scale if "input_scale" in parts else x
        pieces = zip(copy[1:], halves, strict=True) if "swiglu" in parts else [(copy[0], (bias, low_w))]
        outputs = []
        for w, (b, lw) in pieces:
            y = kvopt.qlinear(given, w)
            y = y + b if "bias" in parts else y
            outputs.append(torch.addmm(y, low_x, lw.T) if "low_rank" in parts else y)
        y = silu(outputs[0]) * outputs[1] if "swiglu" in parts else outputs[0]
        return y + residual if "residual" in parts else y

    def fused(copy: Copy) -> Tensor:
        return kvopt.qlinear(x, copy[0], **extra)

    difference = _difference(fused(weights.copies[0]), separate(weights.copies[0]))
    if not difference <= 0.03:  # each separate op rounds to 16 bits
        raise RuntimeError(
            f"{name} at {weights.shape}, M = {m}: fused and separate differ by {difference:.3g}"
        )
    contenders: dict[str, Callable[[Any], Tensor]] = {
        "fused": fused,
        "separate": separate,
        "plain": lambda copy: kvopt.qlinear(x, copy[0]),
    }
    calls = {key: [partial(call, copy) for copy in weights.copies] for key, call in contenders.items()}
    times, failures = timing.interleaved(calls, args.device, args.rounds, args.calls)
    if failures:
        raise RuntimeError("; ".join(f"{key}: {reason}" for key, reason in failures.items()))
    return {
        "case": "epilogue",
        "shape": weights.shape,
        "m": m,
        "n": n,
        "k": k,
        "dtype": args.dtype,
        "recipe": weights.recipe,
        "parts": name,
        "rank": args.rank,
        "fused_us": times["fused"].median_us,
        "separate_us": times["separate"].median_us,
        "plain_us": times["plain"].median_us,
        "speedup": times["separate"].median_us / times["fused"].median_us,
        "difference": difference,
        "copies": len(weights.copies),
    }


def _difference(a: Tensor, b: Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()
