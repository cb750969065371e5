# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of the cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding


@pytest.fixture
def exact_rope(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers rounds RoPE's angles to fp32, some 4e-5 at position 600; fp64 shows real errors."""

    def forward(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        half = self.inv_freq.shape[0]
        frequencies = self.config.rope_parameters["rope_theta"] ** (
            -torch.arange(half, dtype=torch.float64) / half
        )
        self.inv_freq = frequencies
        angles = position_ids[..., None].double() * frequencies
        both = torch.cat([angles, angles], dim=-1)
        return both.cos().to(x.dtype), both.sin().to(x.dtype)

    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", forward)
