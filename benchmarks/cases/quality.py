# SPDX-License-Identifier: Apache-2.0
"""What each weight recipe costs in perplexity: per model, beside the model as it is, with its bits a weight."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import kvopt
from journal import Journal
from kvopt import assets
from kvopt.eval import perplexity, read_documents, windows_of
from kvopt.eval.perplexity import paired_ratio

COLUMNS = ("recipe", "contender", "bits", "model_mb", "perplexity", "stderr", "ratio", "ratio_stderr")
BASELINE = "fp32"
RECIPES = [
    "int8",
    "int8_dyn",
    "int4_g128",
    "int4_g128+a8",
    "int4_g32",
    "nf4",
    "nf4_dq",
    "fp4",
    "int3_g64",
    "int3_g128",
    "int2_g32",
    "int2_g128",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", default=["llama-6m"], help="embedded names or folders")
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--file", default=None, help="text to score (default: the embedded wiki-heldout.txt)")
    parser.add_argument(
        "--calibration", default=None, help="text for recipes that choose their codes by data"
    )
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--limit", type=int, default=10, help="windows")
    parser.add_argument("--dtype", default="fp32", help="of the activations")


def run(args: argparse.Namespace, journal: Journal) -> Iterator[dict[str, Any]]:
    documents = read_documents(args.file or assets.path("wiki-heldout.txt"))
    calibration = None if args.calibration is None else list(read_documents(args.calibration))
    folders = args.models
    for setting in ("file", "calibration"):  # what is recorded names no place on this machine
        setattr(args, setting, getattr(args, setting) and Path(getattr(args, setting)).name)
    args.models = [Path(folder).name for folder in folders]
    for name in folders:
        baseline = None
        for recipe in [BASELINE, *(r for r in args.recipes if r != BASELINE)]:
            start = time.perf_counter()
            model, tokenizer = kvopt.load(name, device=args.device, dtype=args.dtype)
            windows = windows_of(documents, tokenizer, args.window, args.limit)
            try:
                report = None
                if recipe != BASELINE:
                    data = calibration if kvopt.Recipe.parse(recipe).method != "rtn" else None
                    report = kvopt.quantize(model, recipe, data, tokenizer, progress=False)
            except ValueError as error:
                journal.leave_out(recipe, error, name)
                continue
            result = perplexity(model, windows)
            baseline = baseline or result
            ratio, ratio_error = paired_ratio(result, baseline)
            yield {
                "case": "quality",
                "recipe": recipe,
                "contender": Path(name).name,
                "bits": None if report is None else _bits(model, report),
                "model_mb": kvopt.model_nbytes(model) / 1e6,
                "perplexity": result.perplexity,
                "stderr": result.stderr,
                "ratio": ratio,
                "ratio_stderr": ratio_error,
                "windows": len(result.window_nll),
                "window": args.window,
                "seconds": time.perf_counter() - start,
            }


def _bits(model: torch.nn.Module, report: Any) -> float:
    """Bits a weight over all quantised linears, scales and padding included."""
    modules = dict(model.named_modules())
    weights = sum(modules[row.name].in_features * modules[row.name].out_features for row in report.layers)
    return 8 * sum(row.nbytes for row in report.layers) / weights
