# SPDX-License-Identifier: Apache-2.0
"""LLM.int8()'s product with some outlier columns, beside W8A8 without a threshold and the dense product."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

import kvopt
import timing
from compare import DTYPES, SHAPES
from journal import Journal
from peers.ours import copies_of

COLUMNS = ("shape", "m", "outliers", "llm_int8_us", "int8_dyn_us", "dense_us", "speedup", "error")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", default=["8b_gate_up", "8b_down"], choices=list(SHAPES))
    parser.add_argument("--m", nargs="+", type=int, default=[1, 16, 256, 1024, 4096])
    parser.add_argument("--outliers", nargs="+", type=int, default=[0, 6, 32, 128, 512], help="columns of x")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--copies-mb", type=int, default=320)


def run(args: argparse.Namespace, journal: Journal) -> Iterator[dict[str, Any]]:
    journal.versions["kvopt"] = kvopt.__version__
    for shape in args.shapes:
        k, n = SHAPES[shape]
        dense = (torch.randn(n, k, device=args.device) / k**0.5).to(DTYPES[args.dtype])
        weights = {recipe: kvopt.quantize_weight(dense, recipe) for recipe in ("llm_int8", "int8_dyn")}
        count = max(3, min(128, -(-args.copies_mb * 2**20 // weights["int8_dyn"].nbytes)))
        copies: dict[str, list[Any]] = {"dense": [dense.clone() for _ in range(max(2, count // 2))]}
        for recipe, weight in weights.items():
            another = copies_of(weight)
            copies[recipe] = [another() for _ in range(count)]
        for m in args.m:
            for outliers in args.outliers:
                try:
                    yield _row(shape, copies, m, outliers, args)
                except Exception as error:
                    journal.fail(f"{outliers} outliers", error, f"{shape}, M = {m}")


def _row(
    shape: str, copies: dict[str, list[Any]], m: int, outliers: int, args: argparse.Namespace
) -> dict[str, Any]:
    k, n = SHAPES[shape]
    x = torch.randn(m, k, device=args.device).clamp(-5.5, 5.5)
    columns = torch.randperm(k, device=args.device)[:outliers]
    x[torch.randint(0, m, (outliers,), device=args.device), columns] = 30.0
    x = x.to(DTYPES[args.dtype])
    exact = linear(x, copies["dense"][0]).float()
    error = ((kvopt.qlinear(x, copies["llm_int8"][0]).float() - exact).norm() / exact.norm()).item()
    if not error <= 0.02:  # int8 weights and activations
        raise RuntimeError(f"{shape}, M = {m}, {outliers} outliers: {error:.3g} away from the dense product")

    def product(w: Any) -> Tensor:
        return linear(x, w) if isinstance(w, Tensor) else kvopt.qlinear(x, w)

    calls = {name: [partial(product, w) for w in some] for name, some in copies.items()}
    times, failures = timing.interleaved(calls, args.device, args.rounds, args.calls)
    if failures:
        raise RuntimeError("; ".join(f"{key}: {reason}" for key, reason in failures.items()))
    return {
        "case": "outliers",
        "shape": shape,
        "m": m,
        "n": n,
        "k": k,
        "dtype": args.dtype,
        "outliers": outliers,
        **{f"{name}_us": result.median_us for name, result in times.items()},
        "speedup": times["dense"].median_us / times["llm_int8"].median_us,
        "error": error,
        "copies": len(copies["llm_int8"]),
    }
