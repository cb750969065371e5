# SPDX-License-Identifier: Apache-2.0
"""What the methods are for: on a trained model they keep what rounding to nearest loses."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

import kvopt
from kvopt import assets
from kvopt.eval import perplexity, read_documents, windows_of

WINDOW, CALIBRATION, SCORED = 512, 8, 4


@lru_cache
def loss(recipe: str | None) -> float:
    """Log-perplexity of the embedded model, quantised for other windows of the same text."""
    torch.manual_seed(0)
    model, tokenizer = kvopt.load("llama-6m", device="cpu", dtype="fp32")
    documents = read_documents(assets.path("wiki-heldout.txt"))
    windows = windows_of(documents, tokenizer, WINDOW, CALIBRATION + SCORED)
    if recipe is not None:
        report = kvopt.quantize(model, recipe, calibration=windows[:CALIBRATION], progress=False)
        assert all(row.held_out_error <= row.rtn_held_out_error for row in report.layers)
    return torch.tensor(perplexity(model, windows[CALIBRATION:]).perplexity).log().item()


@pytest.mark.parametrize("method", ["gptq", "awq", "clip"])
def test_methods_beat_rounding_at_three_bits(method):
    base, rounded = loss(None), loss("int3_g128")
    assert rounded - base > 0.2  # rounding alone loses some 50 %
    assert loss(f"{method}_3bit_g128") - base < (0.5 if method == "gptq" else 0.8) * (rounded - base)


def test_the_best_method_loses_half_of_what_rounding_loses_at_four_bits():
    base = loss(None)
    assert loss("gptq_4bit_g128") - base < 0.5 * (loss("int4_g128") - base)
