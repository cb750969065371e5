# SPDX-License-Identifier: Apache-2.0
"""The measures on the embedded model: the known figures, in a few seconds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvopt
from kvopt import assets
from kvopt.eval import perplexity, read_documents, read_recall, recall, windows_of


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return kvopt.load("llama-6m", dtype=torch.float32, device="cpu")


def test_known_perplexity_of_ten_windows(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    windows = windows_of(read_documents(assets.path("wiki-heldout.txt")), tokenizer, 1024, 10)
    assert (windows[0, 0], windows.shape) == (0, (10, 1024))
    result = perplexity(model, windows)
    assert result.perplexity == pytest.approx(29.339, abs=0.01)
    assert result.stderr is not None and 1 < result.stderr < 5


def test_a_budget_below_the_text_costs_something(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    windows = windows_of(read_documents(assets.path("wiki-heldout.txt")), tokenizer, 192, 4)
    plain = perplexity(model, windows, prefill=96)
    full = perplexity(model, windows, cache="full", prefill=96)
    sink = perplexity(model, windows, cache="sink_b32_s4", prefill=96)
    assert full.window_nll == pytest.approx(plain.window_nll, rel=1e-4)
    assert sink.perplexity > 1.02 * plain.perplexity


def test_recall_by_both_ways(loaded: tuple[Any, Any]) -> None:
    """The model finds facts in short stories; with most of the story evicted it can't."""
    model, tokenizer = loaded
    stories = read_recall(assets.path("recall.jsonl"), 6)
    plain = recall(model, tokenizer, stories[:2])
    assert plain.recall > 0.8
    assert recall(model, tokenizer, stories[:2], cache="full").recall == plain.recall
    assert recall(model, tokenizer, [stories[1]], cache="sink_b64_s4").recall < 0.5
