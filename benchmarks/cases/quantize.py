# SPDX-License-Identifier: Apache-2.0
"""What quantising costs: seconds and peak memory, for a random model of a large shape on the host, or for a folder.

One decoder layer at a time goes to the device. ``peak_gb`` is all that was allocated there at once, ``above_gb`` the
same without the packed weights of finished layers, which stay, and without the layer's own dense weights.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import kvopt
from journal import Journal
from kvopt.eval import read_documents, windows_of

COLUMNS = (
    *("model", "contender", "layers", "seconds", "seconds_per_layer", "packed_gb", "layer_gb"),
    *("peak_gb", "above_gb", "held_out_error", "rtn_held_out_error"),
)
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {  # Llama 3.1
        "vocab_size": 128256,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
    "1b": {  # Llama 3.2
        "vocab_size": 128256,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="8b", help=f"{', '.join(SHAPES)}, or a folder")
    parser.add_argument("--layers", type=int, default=None, help="of the random model (default: all)")
    parser.add_argument("--recipes", nargs="+", default=["gptq_4bit_g128"])
    parser.add_argument("--windows", type=int, default=128, help="of random tokens, or of the text")
    parser.add_argument("--window", type=int, default=2048, help="tokens in one")
    parser.add_argument(
        "--calibration", default=None, help="text for a folder's model, in place of random tokens"
    )
    parser.add_argument("--dtype", default="bf16", help="of a folder's model")


def run(args: argparse.Namespace, journal: Journal) -> Iterator[dict[str, Any]]:
    folder, text = args.model, args.calibration
    args.model, args.calibration = (value and Path(value).name for value in (folder, text))  # no places
    for recipe in args.recipes:
        tokenizer = None
        if folder in SHAPES:
            model = random_model(SHAPES[folder], args.layers, args.seed, args.device)
        else:
            model, tokenizer = kvopt.load(folder, device="cpu", dtype=args.dtype)
        if text is not None:
            data = windows_of(read_documents(text), tokenizer, args.window, args.windows)
        else:
            drawn = torch.Generator().manual_seed(args.seed)
            data = torch.randint(0, model.config.vocab_size, (args.windows, args.window), generator=drawn)
        layers = model.config.num_hidden_layers
        dense = bytes_in_layers(model) / layers
        meter = Meter(args.device)
        start = time.perf_counter()
        report = kvopt.quantize(model, recipe, data, tokenizer, meter, args.seed, args.device)
        meter.sync()
        seconds = time.perf_counter() - start
        journal.versions[recipe] = f"kvopt {kvopt.__version__}"
        yield {
            "case": "quantize",
            "model": args.model,
            "contender": recipe,
            "layers": layers,
            "seconds": seconds,
            "seconds_per_layer": seconds / layers,
            "packed_gb": meter.packed / 1e9,
            "layer_gb": dense / 1e9,
            "peak_gb": None if meter.peak is None else meter.peak / 1e9,
            "above_gb": None if meter.above is None else (meter.above - dense) / 1e9,
            "held_out_error": _mean(report, "held_out_error"),
            "rtn_held_out_error": _mean(report, "rtn_held_out_error"),
            "calibration_tokens": report.calibration_tokens + report.held_out_tokens,
            "linears": [[row.name, row.seconds] for row in report.layers[: len(report.layers) // layers]],
        }
        del model, report


def bytes_in_layers(model: nn.Module) -> int:
    """Of the dense linears. Keeps none of them: a parameter that is held stays on the device when it is replaced."""
    return sum(p.nbytes for name, p in model.named_parameters() if ".layers." in f".{name}" and p.dim() == 2)


@dataclass
class Meter:
    """Called with the row of each finished linear; the memory is CUDA's, ``None`` elsewhere."""

    device: str
    packed: int = 0
    peak: int | None = None
    above: int | None = None
    _cuda: bool = field(init=False)

    def __post_init__(self) -> None:
        self._cuda = self.device.startswith("cuda")
        if self._cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def __call__(self, row: Any) -> None:
        """Takes the peak since the linear before."""
        if self._cuda:
            peak = torch.cuda.max_memory_allocated()
            self.peak = max(self.peak or 0, peak)
            self.above = max(self.above or 0, peak - self.packed)
            torch.cuda.reset_peak_memory_stats()
        self.packed += row.nbytes

    def sync(self) -> None:
        """Waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()


def random_model(shape: dict[str, Any], layers: int | None, seed: int, device: str) -> nn.Module:
    """A bf16 Llama on the host; its weights are drawn on ``device``, one after the other: the host is slow at that."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**(shape if layers is None else shape | {"num_hidden_layers": layers}))
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)  # its frequencies are no parameters
    model.tie_weights()
    drawn = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                value = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                parameter.copy_(value.normal_(0, 0.02, generator=drawn))
    return model.eval()


def _mean(report: Any, what: str) -> float | None:
    values = [getattr(row, what) for row in report.layers]
    return None if None in values else sum(values) / len(values)
