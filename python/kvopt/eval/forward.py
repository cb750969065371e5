# SPDX-License-Identifier: Apache-2.0
"""Reading tokens with a model for evaluation: in one pass, or one token at a time through a real cache.

A forward pass without a cache never touches a compressed cache, so it can't tell what compression costs. Here the
prompt is prefilled into the cache that will be used, compressed as it would be in use, and every later token is read
alone, by one decoding step over the compressed cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def new_cache(model: torch.nn.Module, spec: str | None) -> Any:
    """A fresh, empty cache: a ``kvopt.Cache``, or transformers' own ``DynamicCache`` for ``None``."""
    if spec is None:
        from transformers import DynamicCache

        return DynamicCache(config=model.config)
    import kvopt

    return kvopt.Cache(model, spec)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[torch.device]:
    """Inference mode, dropout off, and the model's device; the training flag is put back afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield next(model.parameters()).device
    finally:
        model.train(was_training)


def read_prompt(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    """Reads the prompt ``ids`` ``(B, S)`` into ``cache`` and returns the last position's logits ``(B, V)``."""
    out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1]  # type: ignore[no-any-return]


def step(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    """Reads one token per row, ``ids`` ``(B,)``, through ``cache`` and returns its logits ``(B, V)``."""
    out = model(input_ids=ids[:, None], past_key_values=cache, use_cache=True)
    return out.logits[:, -1]  # type: ignore[no-any-return]


def negative_log_likelihood(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """``-log softmax(logits)[target]`` in fp32: logits ``(..., V)``, targets ``(...)`` → ``(...)``."""
    wide = logits.float()
    return wide.logsumexp(-1) - wide.gather(-1, targets[..., None]).squeeze(-1)


def require_finite(values: torch.Tensor, what: str) -> None:
    """Stops an evaluation whose logits are NaN or infinite: such a model must not score anything.

    Raises:
        FloatingPointError: some of ``values`` is not finite.
    """
    bad = ~torch.isfinite(values)
    if bad.any():
        raise FloatingPointError(f"{what}: {int(bad.sum())} of {bad.numel()} positions are NaN or infinite")
