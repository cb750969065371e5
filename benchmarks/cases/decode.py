# SPDX-License-Identifier: Apache-2.0
"""End to end: Hugging Face's generate loop over a random Llama, dense, in our recipes and in others', interleaved.

``prefill`` reads a prompt of ``--prefill`` tokens in one forward pass; ``decode`` continues one of ``--prompt`` tokens.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import kvopt
from journal import Journal
from kvopt.experiments import speed_model
from models import FOREIGN
from peers import Unavailable

COLUMNS = (
    *("model", "contender", "prefill_tok_s", "decode_tok_s", "decode_tok_s_min", "decode_tok_s_max"),
    *("decode_speedup", "prefill_speedup", "model_mb", "logits_difference"),
)
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
    parser.add_argument(
        "--recipes", nargs="*", default=["int8", "int8_dyn", "int4_g128", "int4_g128+a8"], help="ours"
    )
    parser.add_argument("--peers", nargs="*", default=list(FOREIGN), choices=list(FOREIGN), help="others")
    parser.add_argument(
        "--dtype", default="bf16", choices=["bf16", "fp16", "fp32"], help="of the dense model"
    )
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt that is continued")
    parser.add_argument("--tokens", type=int, default=24, help="tokens to generate")
    parser.add_argument(
        "--prefill", type=int, default=512, help="tokens of the prompt that is only read; 0: none"
    )
    parser.set_defaults(rounds=5)


def run(args: argparse.Namespace, journal: Journal) -> list[dict[str, Any]]:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[args.dtype]
    base_name = f"hf_{args.dtype}"
    base = speed_model.build(args.seed, dtype, args.device, **SHAPES[args.model]).eval()
    models: dict[str, Any] = {base_name: base}
    for recipe in args.recipes:
        models[f"kvopt_{recipe}"] = copy.deepcopy(base)
        kvopt.quantize(models[f"kvopt_{recipe}"], recipe, progress=False)
        journal.versions[f"kvopt_{recipe}"] = f"kvopt {kvopt.__version__}"
    for name in args.peers:
        try:
            models[name], journal.versions[name] = FOREIGN[name](base)
        except Unavailable as reason:
            journal.leave_out(name, reason)
        except Exception as error:
            journal.fail(name, error)
    vocabulary = base.config.vocab_size
    prompt = torch.randint(0, vocabulary, (1, args.prompt), device=args.device)
    text = torch.randint(0, vocabulary, (1, args.prefill), device=args.device)
    differences = _differences(models, base_name, prompt)

    prefills: dict[str, list[float]] = {name: [] for name in models}
    decodes: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(-1, args.rounds):  # the first round warms up
        for name in list(models) if turn % 2 == 0 else list(reversed(models)):
            model = models[name]
            first = _seconds(args.device, lambda model=model: _generate(model, prompt, 1))
            whole = _seconds(args.device, lambda model=model: _generate(model, prompt, args.tokens + 1))
            read = None
            if args.prefill:
                read = _seconds(args.device, lambda model=model: model(text, logits_to_keep=1))
            if turn >= 0:
                decodes[name].append(args.tokens / (whole - first))
                prefills[name] += [args.prefill / read] if read else []
    decode = {name: statistics.median(values) for name, values in decodes.items()}
    prefill = {name: statistics.median(values) if values else None for name, values in prefills.items()}
    return [
        {
            "case": "decode",
            "model": args.model,
            "contender": name,
            "prefill_tok_s": prefill[name],
            "decode_tok_s": decode[name],
            "decode_tok_s_min": min(decodes[name]),
            "decode_tok_s_max": max(decodes[name]),
            "decode_speedup": decode[name] / decode[base_name],
            "prefill_speedup": prefill[name] / prefill[base_name] if args.prefill else None,  # type: ignore[operator]
            "model_mb": kvopt.model_nbytes(model) / 1e6 if name.startswith(("hf", "kvopt")) else None,
            "logits_difference": differences[name],
            "prompt": args.prompt,
            "tokens": args.tokens,
            "prefill_tokens": args.prefill,
        }
        for name, model in models.items()
    ]


def _differences(models: dict[str, Any], base: str, prompt: torch.Tensor) -> dict[str, float]:
    """Relative distance of the logits from the dense model's; what computes something else does not take part."""
    exact = models[base](prompt).logits.float()
    result = {}
    for name, model in models.items():
        logits = model(prompt).logits.float()
        result[name] = ((logits - exact).norm() / exact.norm()).item()
        if not result[name] < 1.0:  # random weights: rounding to 4 bits alone moves the logits by some tenths
            raise RuntimeError(f"{name}: its logits are {result[name]:.3g} away from the dense model's")
    return result


def _generate(model: Any, prompt: torch.Tensor, tokens: int) -> None:
    model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)


def _seconds(device: str, call: Callable[[], object]) -> float:
    _sync(device)
    start = time.perf_counter()
    call()
    _sync(device)
    return time.perf_counter() - start


def _sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
