# SPDX-License-Identifier: Apache-2.0
"""The weight-only product beside torch's and others', on the linears of Llama models."""

from __future__ import annotations

import argparse
from typing import Any

import torch

import peers
import timing
from kvopt.weights.formats import WeightFormat, quantize_to
from kvopt.weights.recipe import Recipe

# (K, N) of a Llama-3.1-8B and a Llama-3.2-1B.
SHAPES = {
    "8b_gate_up": (4096, 28672),
    "8b_o": (4096, 4096),
    "1b_gate_up": (2048, 16384),
    "1b_down": (8192, 2048),
    "1b_o": (2048, 2048),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--m", nargs="+", type=int, default=[1], help="rows of activations")
    parser.add_argument("--recipes", nargs="+", default=["int4_g128", "int8"])
    parser.add_argument(
        "--copies-mb", type=int, default=None, help="weights to rotate over, in MB of the packed size"
    )


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for shape in args.shapes:
        k, n = SHAPES[shape]
        for m in args.m:
            rows += _one_shape(args, shape, m, n, k)
    return rows


def _one_shape(args: argparse.Namespace, shape: str, m: int, n: int, k: int) -> list[dict[str, Any]]:
    dtype = torch.float16 if args.device == "cuda" else torch.bfloat16
    weight = (torch.randn(n, k, device=args.device) / k**0.5).to(dtype)
    x = torch.randn(m, k, device=args.device, dtype=dtype)
    exact = x.double() @ weight.double().T

    # Enough copies that the smallest format, 4 bits, does not stay in a cache either.
    total = (args.copies_mb or (256 if args.device == "cuda" else 512)) * 2**20
    copies = max(2, min(64, -(-total // (n * k // 2))))
    contenders: dict[str, timing.Call] = {}
    nbytes: dict[str, int] = {}
    errors: dict[str, float] = {}

    def add(name: str, products: list[peers.Product | None], size: int, bound: float) -> None:
        built = [product for product in products if product is not None]
        if not built:
            return
        y = built[0](x).double()
        error = ((y - exact).norm() / exact.norm()).item()
        if not error <= bound:
            raise RuntimeError(f"{name} at {shape}, M = {m}: relative error {error:.3g} is above {bound}")
        contenders[name] = lambda i: built[i % len(built)](x)
        nbytes[name], errors[name] = size, error

    name = "fp16" if dtype == torch.float16 else "bf16"
    dense = max(2, -(-copies // 4))
    add(f"torch_{name}", [peers.torch_linear(weight.clone(), dtype) for _ in range(dense)], 2 * n * k, 0.01)
    for recipe in args.recipes:
        format = Recipe.parse(recipe).format
        assert isinstance(format, WeightFormat)
        first = quantize_to(weight, format)
        weights = [first] + [quantize_to(weight, format) for _ in range(copies - 1)]
        add(f"kvopt_{recipe}", [w.linear for w in weights], first.nbytes, 0.2 if format.bits == 4 else 0.02)
    y16 = 0.2
    if args.device == "cpu" or dtype == torch.bfloat16:
        add("torch_int4_g128", [peers.torch_int4(weight) for _ in range(copies)], n * k * 17 // 32, y16)
        add("torch_int8", [peers.torch_int8(weight) for _ in range(copies // 2 + 1)], n * k, 0.03)
    else:
        bf16 = weight.bfloat16()
        product = [peers.torch_int4(bf16) for _ in range(copies)]
        x16 = x.bfloat16()
        add(
            "torch_int4_g128",
            [(lambda _, p=p: p(x16)) if p is not None else None for p in product],
            n * k * 17 // 32,
            y16,
        )
    add("bitsandbytes_nf4", [peers.bitsandbytes_4bit(weight) for _ in range(copies)], n * k * 9 // 16, y16)

    times = timing.interleaved(contenders, copies, args.device, args.rounds, args.calls)
    base = times[f"torch_{name}"].median_us
    return [
        {
            "case": "qlinear",
            "shape": shape,
            "m": m,
            "n": n,
            "k": k,
            "contender": contender,
            "relative_error": errors[contender],
            "median_us": t.median_us,
            "p10_us": t.p10_us,
            "p90_us": t.p90_us,
            "gb_per_s": nbytes[contender] / t.median_us / 1e3,
            "gops": 2 * m * n * k / t.median_us / 1e3,
            f"speedup_over_torch_{name}": base / t.median_us,
            "weight_bytes": nbytes[contender],
        }
        for contender, t in times.items()
    ]
