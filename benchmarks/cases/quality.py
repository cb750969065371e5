# SPDX-License-Identifier: Apache-2.0
"""What each weight recipe costs in perplexity: per model, beside the model as it is, with its bits a weight."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping
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
    parser.add_argument("--calibration-windows", type=int, default=24, help="of that text, at most")
    parser.add_argument("--calibration-window", type=int, default=1024, help="tokens in one")
    parser.add_argument(
        "--budget-bits",
        nargs="*",
        type=float,
        default=[],
        help="budgets for a search of formats, bits per weight",
    )
    parser.add_argument("--methods", nargs="+", default=["rtn"], help="that choose the codes after a search")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--limit", type=int, default=10, help="windows")
    parser.add_argument("--dtype", default="fp32", help="of the activations")


def run(args: argparse.Namespace, journal: Journal) -> Iterator[dict[str, Any]]:
    documents = read_documents(args.file or assets.path("wiki-heldout.txt"))
    text = None if args.calibration is None else list(read_documents(args.calibration))
    folders = args.models
    for setting in ("file", "calibration"):  # what is recorded names no place on this machine
        setattr(args, setting, getattr(args, setting) and Path(getattr(args, setting)).name)
    args.models = [Path(folder).name for folder in folders]
    budgets = {
        f"{bits:g} bits, {method}": (method, bits) for bits in args.budget_bits for method in args.methods
    }
    choices: Mapping[str, tuple[str, float | None]] = {
        **{recipe: (recipe, None) for recipe in (BASELINE, *args.recipes)},
        **budgets,
    }
    for name in folders:
        baseline = None
        for choice, (recipe, bits) in choices.items():
            start = time.perf_counter()
            model, tokenizer = _load(name, args, differentiable=bits is not None)
            windows = windows_of(documents, tokenizer, args.window, args.limit)
            try:
                report = None
                if choice != BASELINE:
                    report = _quantize(model, tokenizer, recipe, bits, text, args)
            except ValueError as error:
                journal.leave_out(choice, error, name)
                continue
            quantised = time.perf_counter() - start
            result = perplexity(model, windows)
            baseline = baseline or result
            ratio, ratio_error = paired_ratio(result, baseline)
            yield {
                "case": "quality",
                "recipe": choice,
                "contender": Path(name).name,
                "bits": None if report is None else report.bits,
                "model_mb": kvopt.model_nbytes(model) / 1e6,
                "perplexity": result.perplexity,
                "stderr": result.stderr,
                "ratio": ratio,
                "ratio_stderr": ratio_error,
                "windows": len(result.window_nll),
                "window": args.window,
                "seconds": time.perf_counter() - start,
                "quantise_seconds": quantised,
                "estimated_loss": getattr(report, "estimated_loss", None),
                "chosen": getattr(report, "chosen", None) or None,
            }


def _load(name: str, args: argparse.Namespace, differentiable: bool) -> tuple[Any, Any]:
    with torch.inference_mode(not differentiable):
        return kvopt.load(name, device=args.device, dtype=args.dtype)


def _quantize(
    model: Any,
    tokenizer: Any,
    recipe: str,
    bits: float | None,
    text: list[str] | None,
    args: argparse.Namespace,
) -> Any:
    data = None
    if text is not None and (bits is not None or kvopt.Recipe.parse(recipe).method != "rtn"):
        data = windows_of(text, tokenizer, args.calibration_window, args.calibration_windows)
    return kvopt.quantize(model, recipe, data, tokenizer, progress=False, budget_bits=bits)
