# SPDX-License-Identifier: Apache-2.0
"""Inputs as a linear in a language model sees them: channels of very different size that go together."""

from __future__ import annotations

import torch


def correlated_inputs(tokens: int, k: int) -> torch.Tensor:
    """(tokens, K): sizes over a factor of 30 in random order, half of the variance shared among all columns."""
    shared = torch.randn(tokens, k // 4 + 1) @ torch.randn(k // 4 + 1, k) / (k // 4 + 1) ** 0.5
    sizes = torch.logspace(-0.75, 0.75, k)[torch.randperm(k)]
    return (shared + torch.randn(tokens, k)) * sizes
