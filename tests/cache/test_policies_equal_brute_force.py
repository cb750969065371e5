# SPDX-License-Identifier: Apache-2.0
"""What every policy keeps, layer by layer and head by head after each token, against its definition in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cache import brute_force_policies as oracle
from cache.brute_force_policies import Definition, Kept, PolicyReference
from cache.tiny_models import left_padded, random_ids, tiny_gpt2, tiny_llama
from conftest import relative_error
from kvopt.cache import Cache

POLICIES: dict[str, tuple[Callable[[], Definition], int]] = {
    "window_b24": (oracle.window, 24),
    "sink_b24_s4_orig": (lambda: oracle.window(4), 24),
    "h2o_b24": (oracle.h2o, 24),
    "h2o_b25_r6": (lambda: oracle.h2o(6), 25),
    "h2o_b24_age": (lambda: oracle.h2o(age=True), 24),
    "snapkv_b24_w8": (lambda: oracle.snapkv(8, 5), 24),
    "snapkv_b24_w8_k1_grow": (lambda: oracle.snapkv(8, 1, grow=True), 24),
    "tova_b24": (oracle.tova, 24),
    "random_b24": (oracle.random_draw, 24),
    "random_b24_prompt": (lambda: oracle.random_draw(prompt_only=True), 24),
    "random_b24_seed7": (lambda: oracle.random_draw(7), 24),
    "keydiff_b24": (oracle.keydiff, 24),
    "kvzip_b24": (oracle.kvzip, 24),
}
SETTINGS = {"h2o_b25_r6", "h2o_b24_age", "snapkv_b24_w8_k1_grow", "random_b24_prompt", "random_b24_seed7"}
LAYERS, HEADS = 2, 2


@torch.no_grad()
def compare(
    model: Any,
    spec: str,
    prompts: list[int],
    steps: int,
    definition: Callable[[], Definition],
    capacities: Callable[[int], list[list[int]]],
    ada: int | None = None,
) -> None:
    """Runs a left-padded batch through the cache and each row alone through the definition."""
    rows = [random_ids(1, length) for length in prompts]
    ids, mask = left_padded(rows)
    more = random_ids(len(rows), steps)
    cache = Cache(model, spec)
    references = [PolicyReference(model, definition(), capacities(length), ada) for length in prompts]
    logits = model(ids, attention_mask=mask, past_key_values=cache).logits[:, -1]
    for step in range(-1, steps):
        if step >= 0:
            mask = torch.cat([mask, mask.new_ones((len(rows), 1))], dim=1)
            logits = model(more[:, step : step + 1], attention_mask=mask, past_key_values=cache).logits[:, -1]
        held = [kept(cache, row) for row in range(len(rows))]
        for row, reference in enumerate(references):
            if step < 0:
                expected = reference.prompt(rows[row][0], held[row])
            else:
                expected = reference.step(int(more[row, step]), held[row])
            assert reference.kept() == held[row], f"row {row}, step {step}"
            assert relative_error(logits[row], expected) < 1e-4, f"row {row}, step {step}"
    decisions = steps * len(rows) * LAYERS * HEADS
    assert sum(reference.ties for reference in references) <= 2 + decisions // 200, "too many ties to be ties"


def kept(cache: Cache, row: int) -> Kept:
    """``[layer][head]`` sets of the positions that a row holds."""
    layers = range(cache.architecture.layers)
    return [[set(head) - {-1} for head in cache.positions(layer)[row].tolist()] for layer in layers]


@pytest.mark.parametrize("spec", sorted(set(POLICIES) - SETTINGS))
def test_300_tokens_in_a_padded_batch(spec: str, exact_rope: None) -> None:
    """A prompt longer than the budget and one that is shorter."""
    definition, budget = POLICIES[spec]
    model = tiny_llama(2, torch.float64)
    compare(model, spec, [61, 17], 300, definition, lambda length: [[budget] * HEADS] * LAYERS)


@pytest.mark.parametrize("spec", sorted(POLICIES))
@pytest.mark.parametrize("groups", [1, 4])
def test_other_group_sizes(spec: str, groups: int, exact_rope: None) -> None:
    definition, budget = POLICIES[spec]
    model = tiny_llama(groups, torch.float64)
    compare(model, spec, [30, 47, 3], 40, definition, lambda length: [[budget] * HEADS] * LAYERS)


@pytest.mark.parametrize("spec", sorted(POLICIES))
def test_gpt2(spec: str) -> None:
    definition, budget = POLICIES[spec]
    compare(tiny_gpt2(torch.float64), spec, [41, 20], 40, definition, lambda length: [[budget] * 4] * LAYERS)


def test_per_cent_gives_each_row_its_own_budget(exact_rope: None) -> None:
    model = tiny_llama(2, torch.float64)
    compare(
        model, "h2o_p30", [80, 33], 40, oracle.h2o, lambda length: [[length * 30 // 100] * HEADS] * LAYERS
    )


@pytest.mark.parametrize(("spec", "minimum"), [("pyramidkv_b24_w8", 8), ("h2o_b16+pyramid", 2)])
def test_pyramid(spec: str, minimum: int, exact_rope: None) -> None:
    model = tiny_llama(2, torch.float64, layers=3)
    budget = 24 if "24" in spec else 16
    definition = (lambda: oracle.snapkv(8, 5)) if minimum == 8 else oracle.h2o

    def capacities(length: int) -> list[list[int]]:
        return [[c] * HEADS for c in oracle.pyramid(budget, 3, length, minimum)]

    compare(model, spec, [90, 45, 20], 60, definition, capacities)


@pytest.mark.parametrize(
    ("spec", "definition", "least"),
    [
        ("snapkv_b24_w8+ada", lambda: oracle.snapkv(8, 5), 8),
        ("h2o_b24+ada", oracle.h2o, 4),
        ("keydiff_b24_r4+ada", lambda: oracle.keydiff(4), 4),
        ("kvzip_b24+ada", oracle.kvzip, 4),
    ],
)
def test_ada(spec: str, definition: Callable[[], Definition], least: int, exact_rope: None) -> None:
    model = tiny_llama(2, torch.float64)
    compare(
        model, spec, [70, 20], 60, definition, lambda length: [[24] * HEADS for _ in range(LAYERS)], least
    )
