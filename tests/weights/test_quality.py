# SPDX-License-Identifier: Apache-2.0
"""What the methods are for: on trained models they keep what rounding to nearest loses."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pytest
import torch

import kvopt
from kvopt import assets
from kvopt.eval import perplexity, read_documents, windows_of

WINDOW, CALIBRATION, SCORED = 512, 8, 4
MODELS = ["llama-6m", "llama-27m", "gpt2-18m"]  # the first is embedded


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> str:
    """A model's name or folder."""
    if request.param == MODELS[0]:
        return MODELS[0]
    folder: Path = request.getfixturevalue("models_folder") / request.param
    if not folder.is_dir():
        pytest.skip(f"no {request.param} in KVOPT_MODELS")
    return str(folder)


@lru_cache
def loss(name: str, recipe: str | None) -> float:
    """Log-perplexity of a model, quantised for other windows of the same text."""
    torch.manual_seed(0)
    model, tokenizer = kvopt.load(name, device="cpu", dtype="fp32")
    documents = read_documents(assets.path("wiki-heldout.txt"))
    windows = windows_of(documents, tokenizer, WINDOW, CALIBRATION + SCORED)
    if recipe is not None:
        calibrated = recipe.partition("_")[0] in ("gptq", "awq", "clip")
        data = windows[:CALIBRATION] if calibrated else None
        report = kvopt.quantize(model, recipe, calibration=data, progress=False)
        assert not calibrated or all(row.held_out_error <= row.rtn_held_out_error for row in report.layers)
    return torch.tensor(perplexity(model, windows[CALIBRATION:]).perplexity).log().item()


def lost(name: str, recipe: str) -> float:
    return loss(name, recipe) - loss(name, None)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_methods_beat_rounding_at_three_bits(model, method):
    """By a third at least; GPTQ loses less than half. Rounding loses 40 to 100 % of the perplexity there."""
    rounded = lost(model, "int3_g128")
    assert rounded > 0.2
    assert lost(model, f"{method}_3bit_g128") < (0.5 if method == "gptq" else 0.7) * rounded


def test_clipping_beats_rounding_at_three_bits():
    assert lost(MODELS[0], "clip_3bit_g128") < 0.8 * lost(MODELS[0], "int3_g128")


def test_the_best_method_loses_half_of_what_rounding_loses_at_four_bits(model):
    assert lost(model, "gptq_4bit_g128") < 0.5 * lost(model, "int4_g128")


def test_nf4_is_better_than_fp4(model):
    assert 0 < lost(model, "nf4") < 0.8 * lost(model, "fp4")
