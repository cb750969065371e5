# SPDX-License-Identifier: Apache-2.0
"""The benchmark of quantising measures the product: it holds nothing that would stay on the device."""

from __future__ import annotations

import argparse
import gc
import weakref
from typing import Any

import torch

import kvopt
from kvopt.weights.walk import is_linear


def test_dense_weights_of_finished_layers_are_free(monkeypatch, module):
    case, journal = module("cases.quantize"), module("journal")
    small = {"vocab_size": 64, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setitem(case.SHAPES, "8b", case.SHAPES["8b"] | small | {"intermediate_size": 96})
    quantize, alive = kvopt.quantize, []

    def watched(model: Any, *args: Any) -> Any:
        layers = [m for name, m in model.named_modules() if ".layers." in f".{name}" and is_linear(m)]
        weights = [weakref.ref(module.weight) for module in layers]
        del layers
        report = quantize(model, *args)
        gc.collect()
        alive.extend(weight for weight in weights if weight() is not None)
        return report

    monkeypatch.setattr(kvopt, "quantize", watched)
    parser = argparse.ArgumentParser()
    case.add_arguments(parser)
    args = parser.parse_args(
        ["--layers", "2", "--recipes", "gptq_4bit_g32", "--windows", "4", "--window", "16"]
    )
    args.device, args.seed = "cpu", 3
    with torch.inference_mode():
        (row,) = case.run(args, journal.Journal())
    assert not alive
    assert row["layers"] == 2 and 0 < row["held_out_error"] <= row["rtn_held_out_error"]
    assert row["layer_gb"] == (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96) * 2 / 1e9
    assert row["peak_gb"] is None and row["above_gb"] is None  # not measured on a CPU
