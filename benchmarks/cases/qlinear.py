# SPDX-License-Identifier: Apache-2.0
"""Products over quantised weights beside torch's and other libraries', on the linears of Llama models."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import peers
from compare import COLUMNS, SHAPES, shape_rows
from journal import Journal

__all__ = ["COLUMNS", "add_arguments", "run"]

BASES = {"cpu": ["torch_bf16"], "cuda": ["torch_dense_cublas", "torch_dense_cublaslt"]}
RECIPES = ["int4_g128", "int4_g128+a8", "int8", "int3_g128", "int2_g128", "nf4", "fp4", "int8_dyn"]


def add_arguments(parser: argparse.ArgumentParser, recipes: list[str] = RECIPES) -> None:
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--m", nargs="+", type=int, default=[1], help="rows of activations")
    parser.add_argument("--recipes", nargs="*", default=recipes, help="ours (default %(default)s)")
    parser.add_argument(
        "--peers", nargs="*", default=["all"], help="names, beginnings of names (ggml, bnb), all, or nothing"
    )
    parser.add_argument("--dtype", choices=["fp16", "bf16", "fp32"], help="default: fp16 on CUDA, bf16 else")
    parser.add_argument(
        "--copies-mb", type=int, default=320, help="weights to rotate over, a contender (default %(default)s)"
    )


def run(args: argparse.Namespace, journal: Journal, case: str = "qlinear") -> Iterator[dict[str, Any]]:
    args.dtype = args.dtype or ("fp16" if args.device == "cuda" else "bf16")
    bases = BASES[args.device]
    chosen = peers.select([*bases, *args.peers], args.device)
    contenders = [*chosen, *(peers.contender(recipe) for recipe in args.recipes)]
    for shape in args.shapes:
        yield from shape_rows(case, shape, contenders, bases, args, journal)
