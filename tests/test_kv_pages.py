# SPDX-License-Identifier: Apache-2.0
"""What the KV cache's pages are made with: tables of results, and the choices that only references compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import relative_error


def test_family_and_choice_are_inverse(module: Any) -> None:
    pages = module("kv_pages")
    for spec, budget, whole in [
        ("snapkv_w8+ada", "p25", "snapkv_p25_w8+ada"),
        ("random_prompt", "b256", "random_b256_prompt"),
        ("h2o+int4", "mb3", "h2o_mb3+int4"),
    ]:
        assert pages.choice(spec, budget) == whole
        assert pages.family(whole) == (spec, budget)
    assert pages.family("full+int4") == ("full+int4", "")


def test_tables_show_what_was_measured(module: Any) -> None:
    pages = module("kv_pages")
    common = {"model": "m", "table": "agnostic", "documents": 3, "questions": 20, "recall_stderr": 0.04}
    rows = [
        {**common, "spec": "full", "cache_kb": 9000.0, "recall": 0.96},
        {**common, "spec": "h2o_p25", "cache_kb": 2000.0, "recall": 0.12},
        {**common, "spec": "tova_p25", "cache_kb": 1990.0, "recall": 0.345},
        {**common, "spec": "tova_p50", "cache_kb": 4000.0, "recall": 0.5},
    ]
    lines = pages.markdown(rows, ["tova", "h2o", "full"])
    assert "3 stories, 20 questions" in lines[0]
    assert lines[2] == "| policy | `_p25` (2 MB) | `_p50` (4 MB) |"
    assert lines[4:7] == [
        "| `tova` | 0.34 ± 0.04 | 0.50 ± 0.04 |",
        "| `h2o` | 0.12 ± 0.04 |  |",
        "| `full` | 0.96 ± 0.04 | 0.96 ± 0.04 |",
    ]
    assert pages.markdown(rows, ["snapkv"]) == []


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_orientations_group_what_they_say(module: Any, bits: int) -> None:
    """A vector of one group with 2^bits values in equal steps is kept exactly, whatever the other axis does."""
    references = module("kv_references")
    levels = torch.arange(32) % 2**bits
    levels[:2] = torch.tensor([0, 2**bits - 1])
    scale = 10.0 ** torch.randn(1, 2, 32, 1)
    x = levels * scale + torch.randn(1, 2, 32, 1)  # (B, H, tokens, channels): a scale for each token
    assert relative_error(references.per_token(x, bits), x) < 1e-6
    y = x.transpose(2, 3).contiguous()
    assert relative_error(references.per_channel(y, bits), y) < 1e-6
    if bits == 2:
        assert relative_error(references.per_token(y, bits), y) > 1e-3


def test_spherical_keeps_magnitudes_and_lies_on_the_arc(module: Any) -> None:
    references = module("kv_references")
    a, b = torch.randn(2, 1, 2, 7, 16, dtype=torch.float64)
    a[0, 0, 0] = 2 * b[0, 0, 0]  # the same direction: no arc
    low, high = references.spherical(a, b, 0.6)
    torch.testing.assert_close(low.norm(dim=-1), a.norm(dim=-1))
    torch.testing.assert_close(high.norm(dim=-1), b.norm(dim=-1))

    def angle(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cosine_similarity(x, y, dim=-1).clamp(-1, 1).acos()

    torch.testing.assert_close(angle(a, low), 0.6 * angle(a, b), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(angle(b, high), 0.4 * angle(a, b), atol=1e-6, rtol=1e-6)


def test_merging_leaves_what_differs_most(module: Any) -> None:
    references = module("kv_references")
    layers = [tuple(torch.randn(2, 1, 2, 20, 8)) for _ in range(4)]
    change = references.merged([(2, 3)], references.average, 0.25)
    got = change(layers)
    for layer in (0, 1):
        assert all(torch.equal(x, y) for x, y in zip(got[layer], layers[layer], strict=True))
    distance = -torch.nn.functional.cosine_similarity(layers[2][0], layers[3][0], dim=-1)
    stays = distance >= distance.topk(5, dim=-1).values[..., -1:]
    for part in range(2):
        a, b = layers[2][part], layers[3][part]
        assert torch.equal(got[2][part], torch.where(stays[..., None], a, (a + b) / 2))
        assert torch.equal(got[3][part], torch.where(stays[..., None], b, (a + b) / 2))
